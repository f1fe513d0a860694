from castore.ids import Buffer

def split(
    raw: Buffer, base: Buffer | None, planes: Buffer, kept: Buffer | None, width: int, rotate: bool, /
) -> int: ...
def merge(
    planes: tuple[Buffer, ...], kept: Buffer | None, base: Buffer | None, out: Buffer, width: int, rotate: bool, /
) -> None: ...
