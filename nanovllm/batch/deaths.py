"""Learns from the death of a run which lines are tried apart, and which no more.

A line is blamed for a death that it was near twice in a row. A run that somebody kills from outside
must blame nobody: the second time the line is at work alone, without a sign of a crash it must have
come to the same step, and deaths that it was far from show that somebody kills, so that more is
needed.
"""

from dataclasses import dataclass, field

STRIKES = 2  # deaths while a line was taken, after which it is not tried again
CRASHES = 2  # crashes while it was computed, the last time alone
LONE_DEATHS = 2  # deaths without a sign of a crash, of a line alone at the same step
LONE_DEATHS_ANYWHERE = 24  # the same, at whatever steps
BARREN_DEATHS = 2  # in a row, without a result between: then lines are tried alone
DEATHS_IN_FLIGHT = 3  # in a row, with the same line in flight: then it is tried alone
MAX_PATIENCE = 6  # how much more is needed at most
MAX_VERDICTS = 5  # without a result between: beyond that it is the engine, not its lines
NO_SIGN = "it left no sign of a crash"


@dataclass
class LineHistory:
    """Earlier runs' experience with one line that has no record yet.

    Attributes:
        digest: of the line; with another one the history is not about it.
        strikes: deaths in a row while it was taken.
        deaths: of all kinds in a row while it was in flight.
        kills_near: those of `History.kills` while it was in flight.
        crashes: crashes while it was computed.
        lone_deaths: deaths in a row while it alone was computed, without a sign of a crash.
        lone_step: the step of the last of them, counted from the line's first.
        lone_repeats: how many of them in a row were at that step.
        is_suspect: it is to be computed alone.
        verdict: why it is not tried again; empty if it is.
        is_unreadable: the process died even while its id was read for the error record.
    """

    digest: str
    strikes: int = 0
    deaths: int = 0
    kills_near: int = 0
    crashes: int = 0
    lone_deaths: int = 0
    lone_step: int = 0
    lone_repeats: int = 0
    is_suspect: bool = False
    verdict: str = ""
    is_unreadable: bool = False


@dataclass
class History:
    """The experience of earlier runs.

    Attributes:
        lines: by number.
        barren_deaths: deaths in a row without a result between.
        kills: deaths without a sign of a crash while no line was taken; at the start, too.
        verdicts: how many were given since the last result.
    """

    lines: dict[int, LineHistory] = field(default_factory=dict)
    barren_deaths: int = 0
    kills: int = 0
    verdicts: int = 0

    def settle(self) -> None:
        """After a run that ended by itself: deaths before and after it are not in a row."""
        self.barren_deaths = 0
        self.lines = {
            number: line
            for number, line in self.lines.items()
            if line.strikes or line.is_suspect or line.verdict
        }
        for line in self.lines.values():
            line.deaths = line.lone_deaths = 0

    def condemn(self, line: LineHistory, reason: str) -> None:
        """Give the verdict, unless none of the lines before it was innocent."""
        if line.verdict or self.verdicts < MAX_VERDICTS:
            self.verdicts += not line.verdict
            line.verdict = reason

    def explain(self, line: LineHistory) -> None:
        """The kills near a line were its own: they do not speak for others."""
        self.kills = max(self.kills - line.kills_near, 0)
        for other in self.lines.values():
            other.kills_near = 0

    def patience(self, line: LineHistory) -> int:
        """How much more is needed for a line, as runs died that it was far from."""
        return min(max(self.kills - line.kills_near, 0), MAX_PATIENCE)


@dataclass
class Death:
    """How the last run died.

    Attributes:
        digests: of the lines that had been taken, by number.
        taken: the line that was being taken.
        in_flight: the lines that were queued and have no record.
        lone_steps: how many steps a line that was to be alone had begun; None without one.
        crash: the sign of a crash, such as "Segmentation fault"; empty without one.
        is_of_machine: the machine has started since.
        has_results: the run had written new records.
    """

    digests: dict[int, str]
    taken: int | None
    in_flight: list[int]
    lone_steps: int | None
    crash: str
    is_of_machine: bool
    has_results: bool


def weigh(history: History, death: Death) -> str:
    """Enter a death in the history; a sentence for the user, empty if nothing follows from it."""
    if not death.crash and (death.taken is None or death.is_of_machine):
        history.kills += 1
    if death.taken is None and not death.in_flight:
        return ""  # nothing was at work: the run died as it began, or between two lines
    if death.is_of_machine and not death.crash:
        return ""
    history.barren_deaths = 1 if death.has_results else history.barren_deaths + 1
    for number, line in history.lines.items():
        if number not in death.in_flight:
            line.deaths = 0
        if death.in_flight != [number]:
            line.lone_deaths = 0
    in_flight = [_line(history, death, number) for number in death.in_flight]
    alone = in_flight[0] if len(in_flight) == 1 else None
    sign = death.crash or NO_SIGN
    text = f"the last run died with {len(in_flight)} lines in flight ({sign})"
    if death.taken is not None:
        _enter_strike(history, _line(history, death, death.taken), death.crash)
        text = f"the last run died while line {death.taken} was being taken ({sign})"
    for line in in_flight:
        line.deaths += 1
        if death.taken is None and death.crash:
            line.is_suspect = True
            line.crashes += 1
            if line.crashes >= CRASHES and line is alone:
                history.condemn(
                    line,
                    f"the process crashed {line.crashes} times while it computed this line, the "
                    f"last time alone ({sign})",
                )
        elif death.taken is None:
            line.kills_near += 1
            if line is alone and death.lone_steps is not None:
                _enter_lone_death(history, line, death.lone_steps, death.has_results)
        patience = history.patience(line)
        if (
            history.barren_deaths >= BARREN_DEATHS + patience
            or line.deaths >= DEATHS_IN_FLIGHT + patience
        ):
            line.is_suspect = True
    return text


def _enter_strike(history: History, line: LineHistory, crash: str) -> None:
    line.strikes += 1
    line.is_unreadable = bool(line.verdict)
    if line.strikes >= STRIKES + (0 if crash else history.patience(line)):
        history.condemn(
            line,
            f"the process died {line.strikes} times in a row while it read and queued this line "
            f"({crash or NO_SIGN})",
        )


def _enter_lone_death(history: History, line: LineHistory, step: int, has_results: bool) -> None:
    if has_results:
        line.lone_deaths = 0
    is_same_step = line.lone_deaths > 0 and line.lone_step == step
    line.lone_deaths += 1
    line.lone_repeats = line.lone_repeats + 1 if is_same_step else 1
    line.lone_step = step
    patience = history.patience(line)
    if line.lone_repeats >= LONE_DEATHS + patience or line.lone_deaths >= LONE_DEATHS_ANYWHERE * (
        1 + patience
    ):
        history.explain(line)
        history.condemn(
            line,
            f"the process died {line.lone_deaths} times in a row while it computed this line alone "
            f"({NO_SIGN})",
        )


def _line(history: History, death: Death, number: int) -> LineHistory:
    digest = death.digests[number]
    line = history.lines.get(number)
    if line is None or line.digest != digest:
        line = history.lines[number] = LineHistory(digest)
    return line
