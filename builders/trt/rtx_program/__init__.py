"""The compiled program a TensorRT for RTX plan carries as text, read without a GPU."""

from twotower.builders.trt.rtx_program.read import read_program_text, read_programs
from twotower.builders.trt.rtx_program.records import (
    CopiedCache,
    ExpandedWeight,
    Kernel,
    Program,
    Region,
    Tensor,
)
from twotower.builders.trt.rtx_program.scopes import summarize_programs
from twotower.builders.trt.rtx_program.text import ProgramTextError

__all__ = [
    "CopiedCache",
    "ExpandedWeight",
    "Kernel",
    "Program",
    "ProgramTextError",
    "Region",
    "Tensor",
    "read_program_text",
    "read_programs",
    "summarize_programs",
]
