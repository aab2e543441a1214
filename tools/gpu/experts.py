"""Section `experts`: the runtime's expert kernels at published sizes, beside dense products.

The kernels are those of the pack, compiled elsewhere by the Triton that twotower asks for; without
a pack they are compiled here. NVIDIA's driver loads and launches them, in a graph too.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tools.gpu.expert_cubins import FORMS, GROUP, compile_layers, published
from tools.gpu.questions import Given
from tools.gpu.timing import captured, copy_gb_per_s, median_ms, need_torch
from tools.gpu.unpack import unpack
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short
from twotower.errors import TwoTowerError
from twotower.kernels import ExpertShape, read_manifest, scratch_bytes
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.kernel_experts import ExpertCode, ExpertStep

__all__ = ["ARCHIVE", "FOLDER", "Layer", "ask", "code_folder", "measured"]

ARCHIVE, FOLDER = "experts.tar.xz", "experts"
"""In a pack, and the folder in it."""

TOKENS = (16, 1, 128, 512)
"""The most telling first."""

TOLERANCE = 1e-2
"""Relative to the norm, in bfloat16: hidden rows, an expert's row and the sum are rounded."""

_HEAD = (
    *("weights", "tokens", "launched", "replayed", "rows alone", "experts", "ms", "GB/s"),
    *("of copy", "dense ms", "dense / ms"),
)


def ask(answers: Answers, given: Given) -> None:
    torch = need_torch()
    from cuda.bindings import driver, runtime

    cuda = Cuda(runtime, driver=driver)
    sm = cuda.compute_capability(0)
    copy = copy_gb_per_s(torch)
    folder, where = code_folder(given, sm)
    answers.put(sm=sm, compiled=where, copy_gb_per_s=short(copy))
    rows: list[list[Any]] = []
    for form in FORMS:
        layer = Layer(torch, published(form), device="cuda")
        code = ExpertCode(folder / form, cuda, 0)
        answers.put(triton=code.manifest.triton)
        for count in TOKENS:
            rows.append([form, count, *measured(layer, code, count, copy)])
            answers.put(rows=rows)
            answers.table("One published layer with its shared expert", _HEAD, rows)
        if form == FORMS[0]:
            answers.put(host_us_a_launch=_host_us(layer, code))
        code.close()
        del layer
    right = sum(isinstance(row[2], float) and isinstance(row[3], float) and row[4] for row in rows)
    answers.say(f"{right} of {len(rows)} right, replayed with another routing and row by row too")


def code_folder(given: Given, sm: int) -> tuple[Path, str]:
    """Where the kernels for this GPU are, a folder for each form, and where they were compiled.

    Raises:
        SkipSectionError: none were brought, and none can be compiled here.
    """
    archive, folder = given.find(ARCHIVE), given.work / FOLDER
    if archive is not None:
        with tarfile.open(archive) as packed:
            unpack(packed, given.work)
        if all(sm in read_manifest(folder / form).sms for form in FORMS):
            return folder, "elsewhere"
    try:
        compile_layers(folder, [sm])
    except TwoTowerError as e:
        raise SkipSectionError(f"{e.what}: {e.found}") from e
    return folder, f"here: none were brought for SM {sm}"


def measured(layer: Layer, code: ExpertCode, count: int, copy: float) -> list[Any]:
    """The row of a number of tokens, without its first two columns.

    Args:
        layer: The weights.
        code: The kernels.
        count: Tokens.
        copy: Bytes a copy in device memory reads and writes, GB/s.
    """
    torch = layer.torch
    case = layer.case(count)
    run = layer.bound(code, case)
    run()
    torch.cuda.synchronize()
    alone = layer.rows_alone(code, case, range(0, count, max(1, count // 4)))
    launched = _error(layer, case)
    graph = captured(torch, run)
    layer.route(case)  # what is captured follows a list that changes
    graph.replay()
    replayed = _error(layer, case)
    ms = median_ms(torch, graph.replay)
    dense_ms = median_ms(torch, lambda: layer.dense(case))
    rate = layer.bytes_read(case) / ms / 1e6
    chosen = int((case.shares != 0).any(1).sum())
    speed = map(short, (ms, rate, rate / copy, dense_ms, dense_ms / ms))
    return [launched, replayed, alone, chosen, *speed]


def _error(layer: Layer, case: Case) -> float | str:
    """Of the result, relative to the norm, once it is there; words where it is wrong."""
    layer.torch.cuda.synchronize()
    wanted = layer.expected(case)
    error = float((case.out.float() - wanted).norm() / wanted.norm())
    case.out.fill_(float("nan"))
    return short(error) if error < TOLERANCE else f"WRONG {error:.1e}"  # so is NaN


def _host_us(layer: Layer, code: ExpertCode, *, rounds: int = 200) -> float:
    """Microseconds of the host a launch, the median of five rows of steps of 16 tokens."""
    run, launches = layer.bound(code, layer.case(TOKENS[0])), len(code.launches(TOKENS[0]))
    times = []
    for _ in range(5):
        layer.torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            run()
        times.append((time.perf_counter() - began) / rounds / launches * 1e6)
    layer.torch.cuda.synchronize()
    return short(median(times))


@dataclass
class Case:
    """Tokens [N,D], shares [E,N] and the result [N,D] on the device; and what its launches use."""

    x: Any
    shares: Any
    out: Any
    held: Any = None


class Layer:
    """Random weights as a bundle stores them, and the same in the model's type for other forms.

    Args:
        torch: The module.
        shape: The layer.
        device: Where its arrays lie.
    """

    def __init__(self, torch: Any, shape: ExpertShape, *, device: str) -> None:
        self.torch, self.shape, self.device = torch, shape, device
        self._random = torch.Generator(device).manual_seed(0)
        self.stored: dict[str, Any] = {}
        self.whole: dict[str, Any] = {}
        for name in ("up", "down", "shared_up", "shared_down"):
            size = shape.stored_shape(name)
            if shape.weights.of(name) is None:
                self.whole[name] = self.stored[name] = self._normal(*size, scale=size[-1] ** -0.5)
            else:
                self._quantized(name, size)

    def case(self, count: int) -> Case:
        """Tokens that choose at random."""
        x = self._normal(count, self.shape.hidden, scale=1.0)
        shares = self.torch.empty(self.shape.experts, count, device=self.device)
        case = Case(x, shares, self.torch.full_like(x, float("nan")))
        self.route(case)
        return case

    def route(self, case: Case) -> None:
        """Another choice of experts for each token, in the same place."""
        e, top, count = self.shape.experts, self.shape.top, len(case.x)
        options = {"device": self.device, "generator": self._random}
        chosen = self.torch.rand(count, e, **options).topk(top, 1).indices
        shares = self.torch.zeros(count, e, device=self.device)
        shares.scatter_(1, chosen, 0.1 + self.torch.rand(count, top, **options))
        case.shares.copy_(shares.T)

    def bound(self, code: ExpertCode, case: Case) -> Callable[[], None]:
        """The launches of a case on torch's current stream."""
        count = len(case.x)
        bytes_needed = scratch_bytes(self.shape, count)
        scratch = self.torch.empty(bytes_needed + 256, dtype=self.torch.uint8, device=self.device)
        arrays = {"x": case.x, "shares": case.shares, "out": case.out, **self.stored}
        addresses = {name: array.data_ptr() for name, array in arrays.items()}
        step = ExpertStep(code, count, addresses, -(-scratch.data_ptr() // 256) * 256)

        case.held = scratch, arrays

        def run() -> None:
            step.enqueue(self.torch.cuda.current_stream().cuda_stream)

        return run

    def rows_alone(self, code: ExpertCode, case: Case, rows: Sequence[int]) -> bool:
        """Whether rows computed alone are those of the case, to the bit."""
        for row in rows:
            shares = case.shares[:, row : row + 1].contiguous()
            one = Case(case.x[row : row + 1].clone(), shares, case.out[row : row + 1].clone())
            self.bound(code, one)()
            self.torch.cuda.synchronize()
            if not self.torch.equal(one.out[0], case.out[row]):
                return False
        return True

    def expected(self, case: Case) -> Any:
        """The layer in float32, expert by expert."""
        x = case.x.float()
        out = self._mlp(x, self.whole["shared_up"], self.whole["shared_down"])
        for e in (case.shares != 0).any(1).nonzero()[:, 0].tolist():
            rows = case.shares[e].nonzero()[:, 0]
            each = self._mlp(x[rows], self.whole["up"][e], self.whole["down"][e])
            out[rows] += case.shares[e, rows, None] * each
        return out

    def dense(self, case: Case) -> Any:
        """Every expert on every token, as the exported graphs have it."""
        torch, count = self.torch, len(case.x)
        x = case.x.expand(self.shape.experts, count, self.shape.hidden)
        h = torch.relu(torch.bmm(x, self.whole["up"].transpose(1, 2))).square()
        y = torch.bmm(h, self.whole["down"].transpose(1, 2))
        shared = torch.relu(case.x @ self.whole["shared_up"].T).square()
        return (y.float() * case.shares[..., None]).sum(0) + shared @ self.whole["shared_down"].T

    def bytes_read(self, case: Case) -> float:
        """Of the weights that have to be read once: the chosen experts' and the shared one's."""
        share = float((case.shares != 0).any(1).sum()) / self.shape.experts
        total = 0.0
        for name, array in self.stored.items():
            size = array.numel() * array.element_size()
            total += size if name.startswith("shared") else size * share
        return total

    def _mlp(self, x: Any, up: Any, down: Any) -> Any:
        return self.torch.relu(x @ up.float().T).square() @ down.float().T

    def _normal(self, *size: int, scale: float) -> Any:
        options = {"device": self.device, "generator": self._random}
        return self.torch.randn(*size, dtype=self.torch.bfloat16, **options) * scale

    def _quantized(self, name: str, size: Sequence[int]) -> None:
        """4-bit integers with a scale a group, and what they stand for, rounded as it is read."""
        torch = self.torch
        options = {"device": self.device, "generator": self._random}
        *rows, columns = size
        packed = torch.randint(0, 256, (*rows, columns // 2), dtype=torch.uint8, **options)
        scales = (0.75 + torch.rand(*rows, columns // GROUP, **options)) / (4.6 * columns**0.5)
        self.stored[name], self.stored[f"{name}_scale"] = packed, scales.to(torch.bfloat16)
        whole = torch.empty(*size, dtype=torch.bfloat16, device=self.device)
        for e in range(size[0]):
            codes = torch.stack([packed[e] & 15, packed[e] >> 4], -1).reshape(size[1:])
            values = ((codes ^ 8).float() - 8).unflatten(-1, (-1, GROUP))
            factors = self.stored[f"{name}_scale"][e].float()[..., None]
            whole[e] = (values * factors).flatten(-2)
        self.whole[name] = whole
