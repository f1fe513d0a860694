"""The code is the one that docs/FORMAT.md defines, whatever library computes it."""

from __future__ import annotations

import builtins
import random

import pytest

from castore.errors import MissingExtraError
from castore.parity.code import ErasureCode

pytest.importorskip("pyeclib")


def powers() -> list[int]:
    """x ** n in GF(256) with the polynomial 0x11d."""
    found, value = [], 1
    for _ in range(255):
        found.append(value)
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    return found


POWERS = powers()
LOGS = {value: index for index, value in enumerate(POWERS)}


def divided(a: int, b: int) -> int:
    return POWERS[(LOGS[a] - LOGS[b]) % 255] if a else 0


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (5, 3), (100, 10), (128, 127), (250, 5)])
def test_parity_is_the_cauchy_sum_of_the_format_document(k: int, m: int) -> None:
    data = random.Random(k).randbytes(64 * k)
    for row, cell in enumerate(ErasureCode(k, m).encode(data)[:4]):
        for place in (0, 1, 63):
            expected = 0
            for j in range(k):
                expected ^= divided(data[64 * j + place], (k + row) ^ j)
            assert cell[place] == expected


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 2), (10, 10), (100, 10), (20, 1)])
def test_any_k_of_the_cells_restore_the_data(k: int, m: int) -> None:
    code = ErasureCode(k, m)
    chance = random.Random(7)
    for cell_bytes in (64, 192, 4096):
        data = chance.randbytes(k * cell_bytes)
        whole = [data[at : at + cell_bytes] for at in range(0, len(data), cell_bytes)]
        whole += [bytes(cell) for cell in code.encode(data)]
        for _ in range(5):
            lost = set(chance.sample(range(k + m), chance.randint(0, m)))
            restored = code.restore([None if number in lost else cell for number, cell in enumerate(whole)])
            assert restored.keys() == {number for number in lost if number < k}
            assert all(bytes(cell) == whole[number] for number, cell in restored.items())


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **options: object) -> object:
        if name.startswith("pyeclib"):
            raise ImportError(name)
        return real(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"castore\[parity\]"):
        ErasureCode(3, 1)
