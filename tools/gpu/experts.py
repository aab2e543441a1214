"""Section `experts`: the runtime's expert kernels at published sizes, beside dense products.

The kernels are compiled here, by the Triton that is installed, for this GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tools.gpu.questions import Given
from tools.gpu.timing import captured, copy_gb_per_s, median_ms, need_torch
from twotower.config.formats import FORMATS
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short
from twotower.errors import TwoTowerError
from twotower.kernels import ExpertFormats, ExpertShape, scratch_bytes
from twotower.kernels.compile import compile_kernels
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.experts import ExpertCode, ExpertStep

__all__ = ["Layer", "ask", "published"]

TOKENS = (16, 1, 128, 512)
"""The most telling first."""

GROUP = 32
"""Of int4."""

_TOLERANCE = 1e-2
"""Relative to the norm, in bfloat16: hidden rows, an expert's row and the sum are rounded."""

_HEAD = ("weights", "tokens", "error", "ms", "experts", "GB/s", "of copy", "dense ms", "alone")


def published(form: str) -> ExpertShape:
    """The published layer with routed experts in bfloat16 or int4, the shared one in bfloat16."""
    how = replace(FORMATS["int4"], group=GROUP) if form == "int4" else None
    sizes = {"hidden": 2688, "width": 1856, "experts": 128, "top": 6, "shared_intermediate": 3712}
    return ExpertShape(**sizes, dtype="bfloat16", weights=ExpertFormats(up=how, down=how))


def ask(answers: Answers, given: Given) -> None:
    torch = need_torch()
    from cuda.bindings import driver, runtime

    cuda = Cuda(runtime, driver=driver)
    sm = cuda.compute_capability(0)
    copy = copy_gb_per_s(torch)
    rows: list[list[Any]] = []
    for form in ("bfloat16", "int4"):
        shape = published(form)
        folder = given.work / f"experts-{form}"
        try:
            compile_kernels(shape, [sm], folder)
        except TwoTowerError as e:
            raise SkipSectionError(f"{e.what}: {e.found}") from e
        layer = Layer(torch, shape, device="cuda")
        code = ExpertCode.open(folder, cuda, 0)
        answers.put(sm=sm, triton=code.manifest.triton, copy_gb_per_s=short(copy))
        for count in TOKENS:
            rows.append([form, count, *measured(layer, code, count, copy)])
            answers.put(rows=rows)
            answers.table("One published layer with its shared expert", _HEAD, rows)
        code.close()
        del layer


def measured(layer: Layer, code: ExpertCode, count: int, copy: float) -> list[Any]:
    """The row of a number of tokens, without its first two columns."""
    torch = layer.torch
    case = layer.case(count)
    run = layer.bound(code, case)
    run()
    torch.cuda.synchronize()
    wanted = layer.expected(case)
    error = float((case.out.float() - wanted).norm() / wanted.norm())
    alone = layer.rows_alone(code, case, range(0, count, max(1, count // 4)))
    ms = median_ms(torch, captured(torch, run).replay)
    dense_ms = median_ms(torch, lambda: layer.dense(case))
    rate = layer.bytes_read(case) / ms / 1e6
    right = f"{error:.1e}" if error < _TOLERANCE else f"WRONG {error:.1e}"
    chosen = int((case.shares != 0).any(1).sum())
    return [right, short(ms), chosen, short(rate), short(2 * rate / copy), short(dense_ms), alone]


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
        """Tokens that choose at random, a different set each."""
        e, top = self.shape.experts, self.shape.top
        options = {"device": self.device, "generator": self._random}
        chosen = self.torch.rand(count, e, **options).topk(top, 1).indices
        shares = self.torch.zeros(count, e, device=self.device)
        shares.scatter_(1, chosen, 0.1 + self.torch.rand(count, top, **options))
        x = self._normal(count, self.shape.hidden, scale=1.0)
        return Case(x, shares.T.contiguous(), self.torch.full_like(x, float("nan")))

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
