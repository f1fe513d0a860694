from castore.ids import Buffer

def split(
    raw: Buffer,
    base: Buffer | None,
    planes: Buffer,
    kept: Buffer | None,
    width: int,
    mode: int,
    alpha: float,
    /,
) -> int: ...
def merge(
    planes: tuple[Buffer, ...],
    kept: Buffer | None,
    base: Buffer | None,
    out: Buffer,
    width: int,
    mode: int,
    alpha: float,
    /,
) -> None: ...
def count(row: Buffer, counts: Buffer, /) -> None: ...
def derive(master: Buffer, out: Buffer, rule: int, /) -> None: ...
