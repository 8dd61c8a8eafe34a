"""`python -m quant MODEL --scheme w4a8-fp8 --method gptq --calib text.txt --out DIR`: quantizes a Llama's checkpoint.

`python -m quant convert SRC --out DST` brings a quantized checkpoint into a format that loads without pickles.
"""

import argparse
import ctypes
import sys
from collections.abc import Sequence

from quant import convert
from quant.ptq import command

M_MMAP_THRESHOLD = -3  # of malloc.h


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 for a mistake of the user's, which is one line on stderr; 130 where the user stopped it."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["convert"]:
        parser = argparse.ArgumentParser(prog="python -m quant convert", description=convert.HELP)
        convert.add_arguments(parser)
        run, args = convert.run, parser.parse_args(given[1:])
    else:
        run, args = command.run, command.read_arguments(given)
    try:
        return run(args)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        sys.stderr.write(f"python -m quant: {named}\n")
        return 2
    except ValueError as error:
        sys.stderr.write(f"python -m quant: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("python -m quant: interrupted\n")
        return 130


def give_back_large_blocks() -> None:
    """Memory of 4 MB and more goes back to the system as soon as it is free (glibc's malloc).

    Left to itself the heap keeps tensors of many sizes apart by holes: 577 MB in place of 398 for a layer of 1024
    columns and 32,768 tokens, for a fifth less time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 << 20)


if __name__ == "__main__":
    give_back_large_blocks()
    sys.exit(main())
