from castore.ids import Buffer

def split(
    raw: Buffer,
    base: Buffer | None,
    planes: Buffer,
    kept: Buffer | None,
    width: int,
    mode: int,
    alpha: float,
    counts: Buffer | None,
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
    ordered: bool,
    /,
) -> None: ...
def sample(
    raw: Buffer,
    base: Buffer | None,
    width: int,
    mode: int,
    alpha: float,
    windows: int,
    window_bytes: int,
    grouped: bool,
    segment_items: int,
    table: Buffer,
    /,
) -> tuple[int, int, int, int, int]: ...
def ratio(raw: Buffer, base: Buffer, windows: int, window_bytes: int, items_max: int, /) -> tuple[float, int]: ...
def derive(master: Buffer, out: Buffer, rule: int, /) -> None: ...
