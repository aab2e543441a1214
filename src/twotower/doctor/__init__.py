"""What `twotower doctor` looks at, and the archive that it and the first hour on a GPU write."""

from twotower.doctor.archive import Archive, merge_results, read_results, write_page
from twotower.doctor.machine import RUNS, machine_facts, targets_here
from twotower.doctor.page import device_page, page_name
from twotower.doctor.sections import Answers, Section, SkipSectionError, answer_section, ask_section

__all__ = [
    "RUNS",
    "Answers",
    "Archive",
    "Section",
    "SkipSectionError",
    "answer_section",
    "ask_section",
    "device_page",
    "machine_facts",
    "merge_results",
    "page_name",
    "read_results",
    "targets_here",
    "write_page",
]
