"""Whether inline asm that shares a scale among four elements finds them along the last axis, as it must.

tl.inline_asm_elementwise hands a thread's registers over four elements at a time, in the order of their layout, which
Triton picks.  Asm whose text says `// shares` takes one element's scale for all four (tests/ptx.py), so a layout with
neighbours along another axis would be wrong on a GPU alone.  Read from the layouts in Triton's own IR.
"""

import re
from collections.abc import Iterator

ASM = re.compile(r'tt\.elementwise_inline_asm ("(?:[^"\\]|\\.)*").*? : (.*?) -> ')
ALIAS = re.compile(r"^(#\w+) = (#ttg\.\w+<.*>)$", re.MULTILINE)
LAYOUT = re.compile(r"tensor<[\dx]+x\w+, (#ttg\.\w+<\{.*?\}>|#\w+)>")


def along_last_axis(layout: str) -> bool:
    """Whether a thread's first four elements are neighbours along the last of two axes."""
    if found := re.search(r"dot_op<\{opIdx = 0, .*kWidth = (\d+)\}", layout):
        return int(found[1]) >= 4
    if found := re.search(r"blocked<\{sizePerThread = \[\d+, (\d+)\].*order = \[1, 0\]", layout):
        return int(found[1]) >= 4
    return bool(re.search(r"linear<\{register = \[\[0, 1\], \[0, 2\]", layout))


def astray(ttgir: str) -> Iterator[str]:
    """Layouts of shared packs that do not lie along the last axis."""
    names = dict(ALIAS.findall(ttgir))
    for text, types in ASM.findall(ttgir):
        if "// shares" not in text:
            continue
        layouts = LAYOUT.findall(types)
        if not layouts:
            yield f"no layout in {types[:200]!r}"
        for layout in dict.fromkeys(layouts):
            if not along_last_axis(names.get(layout, layout)):
                yield names.get(layout, layout)
