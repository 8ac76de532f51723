"""Shuffles of PTX that lanes of one warp may reach without each other.

A `shfl.sync` must be run by all lanes of a warp at once. LLVM knows that of its own, and not of one in inline assembly:
moved into a branch that lanes decide for themselves, it would wait for other lanes or read what they have not written.

A branch holds an instruction if going one way always leads there and going the other way may not (control dependence,
from post-dominators), or if it holds a branch that does. It is decided by lanes if its predicate varies within a warp:
if it comes from %tid, unless the lane's five bits are shifted or masked away, or from %laneid, from what was loaded
from, or shuffled by, such an address, or from what was written under such a branch. A value has a period: the lanes
after which it repeats, 1 where all agree. Added to that of the lane half a period away, it repeats twice as soon.

Source: Ferrante, Ottenstein, Warren, "The program dependence graph and its use in optimization", TOPLAS 9(3), 1987.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

_NAME = re.compile(r"%?[A-Za-z_$][\w$.]*")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_NO_RESULT = ("st.", "bra", "bar", "barrier", "red.", "ret", "exit", "trap", "cp.", "fence", "membar", "prefetch",
              "discard", "mbarrier.init", "mbarrier.inval", "mbarrier.expect", "wgmma.fence", "wgmma.commit",
              "wgmma.wait", "griddepcontrol", "setmaxnreg", "nanosleep", "stmatrix")  # fmt: skip
_VARIES = ("%tid", "%laneid", "%lanemask", "%clock")
_ENDS = ("ret", "exit", "trap")
_LANES = 32
_BEGIN, _END = "begin inline", "end inline"  # in the place of LLVM's comments


@dataclass
class _Instruction:
    operation: str
    predicate: str
    written: set[str]
    read: set[str]
    text: str
    inline: bool = False


@dataclass
class _Block:
    instructions: list[_Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def divergent_shuffles(ptx: str) -> list[str]:
    """The shuffles in inline assembly that are under a condition on which lanes of a warp may disagree, as text."""
    blocks, threads = _blocks(ptx)
    holders = _holders(blocks)
    across = _across(blocks)
    periods: dict[str, int] = {}  # of what varies
    grew = True
    while grew:
        before = dict(periods)
        for number, block in enumerate(blocks):
            apart = any(_decides(blocks[holder], periods) for holder in holders[number])
            for each in block.instructions:
                period = _LANES if apart or each.predicate in periods else _period(each, periods, threads, across)
                if period > 1:
                    periods |= {name: max(period, periods.get(name, 1)) for name in each.written}
        grew = periods != before
    return [
        each.text
        for number, block in enumerate(blocks)
        for each in block.instructions
        if each.operation.startswith("shfl.")
        and each.inline
        and (each.predicate in periods or any(_decides(blocks[holder], periods) for holder in holders[number]))
    ]


def _across(blocks: list[_Block]) -> dict[str, tuple[set[str], int]]:
    """For a register that holds another lane's value, the one that it comes from and how far away that lane is."""
    every = [each for block in blocks for each in block.instructions]
    times = Counter(name for each in every for name in each.written)
    found: dict[str, tuple[set[str], int]] = {}
    for each in every:
        _, *operands = (part.strip() for part in each.text.split(","))
        single = all(times[name] == 1 for name in each.written | each.read)
        if single and each.operation.startswith("shfl.sync.bfly") and operands[1].isdigit() and operands[2] == "31":
            found |= {name: (each.read, int(operands[1])) for name in each.written}
    return found


def _decides(block: _Block, periods: dict[str, int]) -> bool:
    return bool(block.instructions) and block.instructions[-1].predicate in periods


def _period(
    each: _Instruction, periods: dict[str, int], threads: dict[str, int], across: dict[str, tuple[set[str], int]]
) -> int:
    """Lanes after which a result repeats.

    threads: registers that hold %tid, of whose bits the lowest five alone differ within a warp, and its shift there.
    """
    operands, varying = each.text.split(","), each.read & periods.keys()
    last = operands[-1].strip()
    if any(name.startswith(_VARIES) for name in each.read):
        return _LANES
    if each.operation.startswith(("redux.sync", "vote.sync")):
        return 1 if varying <= {name for operand in operands[1:2] for name in _NAME.findall(operand)} else _LANES
    if each.operation.startswith("shfl.sync.idx") and not _NAME.fullmatch(operands[2].strip()):
        return 1  # all get that of one lane
    if each.operation.startswith(("atom.", "elect.", "mbarrier.try", "mbarrier.test", "activemask")):
        return _LANES
    if not varying:
        return 1
    if varying <= threads.keys() and last.lstrip("-").isdigit():
        shift = threads[min(varying)]
        if each.operation.startswith("shr.") and int(last) >= shift + 5:
            return 1
        if each.operation.startswith("and."):
            return 1 << ((int(last) >> shift) % _LANES).bit_length()
    if each.operation.startswith("shfl.") and not each.operation.startswith("shfl.sync.bfly"):
        return _LANES
    period = max(periods[name] for name in varying)
    for name in varying & across.keys() if each.operation.startswith(("add.", "max.", "min.")) else ():
        origin, distance = across[name]
        if each.read == origin | {name} and period == 2 * distance:
            return distance
    return period


def _blocks(ptx: str) -> tuple[list[_Block], dict[str, int]]:
    """The basic blocks of the only kernel in a text, of which the last is its end, and the shift of each register
    that holds %tid."""
    body = ptx.replace("// begin inline asm", f";{_BEGIN};").replace("// end inline asm", f";{_END};")
    body = re.sub(r"//[^\n]*", "", body)
    body = body[body.index("{", body.index(".entry")) + 1 : body.rindex("}")]
    body = re.sub(r"^\s*\.(loc|file|pragma|section)\b[^\n]*", "", body, flags=re.MULTILINE)
    blocks, jumps = [_Block()], {}
    threads: dict[str, int] = {}
    named: dict[str, list[int]] = {}
    inline = False
    for part in re.sub(r"^\s*([\w$]+:)(?!:)", r";\1;", body, flags=re.MULTILINE).split(";"):
        text = part.strip()
        if text in (_BEGIN, _END):
            inline = text == _BEGIN
            continue
        while text[:1] in ("{", "}"):
            text = text[1:].strip()
        if re.fullmatch(r"[\w$]+:", text):
            if blocks[-1].instructions or blocks[-1].after:
                blocks.append(_Block())
            named.setdefault(text[:-1], []).append(len(blocks) - 1)  # a name in braces may come again
            continue
        if not text or text.startswith("."):
            continue
        each = _read(text)
        each.inline = inline
        blocks[-1].instructions.append(each)
        if each.operation == "mov.u32" and each.read == {"%tid.x"}:
            threads |= dict.fromkeys(each.written, 0)
        elif each.operation == "shl.b32" and each.read <= threads.keys() and text.split()[-1].isdigit():
            threads |= dict.fromkeys(each.written, threads[min(each.read)] + int(text.split()[-1]))
        if each.operation.startswith(("bra", *_ENDS)):
            jumps[len(blocks) - 1] = each
            blocks.append(_Block())
    blocks.append(_Block())
    for number, block in enumerate(blocks[:-1]):
        jump = jumps.get(number)
        if jump is None or jump.predicate:
            block.after.append(number + 1)
        if jump is not None:
            to_end = jump.operation.startswith(_ENDS)
            block.after.append(len(blocks) - 1 if to_end else _nearest(named, jump.text, number))
    return blocks, threads


def _nearest(named: dict[str, list[int]], jump: str, number: int) -> int:
    """The block that a jump in block `number` goes to: of equal names the last one before it, else the first behind."""
    label = next(word for word in reversed(jump.split()) if word in named)
    places = named[label]
    return max((place for place in places if place <= number), default=places[0])


def _read(text: str) -> _Instruction:
    found = _STATEMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"not an instruction of PTX: {text!r}")
    _, predicate, operation, rest = found.groups()
    operands = _operands(rest)
    results = [] if operation.startswith(_NO_RESULT) else operands[:1]
    written = {name for operand in results if "[" not in operand for name in _NAME.findall(operand)}
    read = {name for operand in operands[len(results) :] for name in _NAME.findall(operand)}
    return _Instruction(operation, predicate or "", written, read, text)


def _operands(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _holders(blocks: list[_Block]) -> list[set[int]]:
    """For each block those that end in a branch on which it depends, directly or by another."""
    last = len(blocks) - 1
    everything = set(range(len(blocks)))
    behind = [everything.copy() for _ in blocks]  # post-dominators, the block itself included
    behind[last] = {last}
    changed = True
    while changed:
        changed = False
        for number in range(last - 1, -1, -1):
            after = blocks[number].after
            found = set.intersection(*(behind[other] for other in after)) | {number} if after else {number}
            if found != behind[number]:
                behind[number], changed = found, True
    holders: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        for other in set(block.after):
            for held in behind[other] - (behind[number] - {number}):
                holders[held].add(number)
    changed = True
    while changed:
        changed = False
        for number, found in enumerate(holders):
            wider = found.union(*(holders[holder] for holder in found))
            if wider != found:
                holders[number], changed = wider, True
    return holders
