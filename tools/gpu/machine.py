"""Section `machine`: what is here."""

from __future__ import annotations

from tools.gpu.questions import Given
from twotower.doctor import Answers
from twotower.doctor.machine import put_machine
from twotower.hardware import probe_machine

__all__ = ["ask"]


def ask(answers: Answers, given: Given) -> None:
    put_machine(answers, probe_machine())
    answers.put(pack=[folder.name for folder in given.pack])
