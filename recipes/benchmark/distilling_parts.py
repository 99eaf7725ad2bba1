"""What ``distilling.py`` measures, part by part, and in which order."""

from dataclasses import dataclass, field

__all__ = ["LOGGED_EVERY", "WHOLE", "Launch", "Part", "plan"]

WARM_UP = 3  # plain steps
LOGGED_EVERY = 5  # steps: such a step counts spikes, uncompiled; the recipe's own are 10
WHOLE = "whole"  # the part that a killed and resumed run is compared with


@dataclass(frozen=True)
class Part:
    """One run of the recipe.

    Attributes:
        name: of its record.
        size: of the model, of those that state-spaces published.
        sharding: 'alone' (one process without torchrun), 'ddp' or 'fsdp2'.
        gpus: how many.
        steps: as many as the run has.
        rows, accumulated: of a batch on a GPU, and batches of a step.
        checkpointing: gradient checkpointing.
        save_at: the step whose checkpoint is written; 0: none.
        kill_at: the step in whose midst every process is killed by SIGKILL; 0: none.
        resumes: the name of the part whose run goes on from its checkpoint.
        profiled: take a profile of one step.
        limit: seconds after which the part is given up.
        least: seconds without which it is not begun.
    """

    name: str
    size: str
    sharding: str
    gpus: int
    steps: int
    rows: int = 2
    accumulated: int = 4
    checkpointing: bool = True
    save_at: int = 0
    kill_at: int = 0
    resumes: str = ""
    profiled: bool = False
    limit: int = 90
    least: int = 25

    def is_logged(self, step: int) -> bool:
        return step % LOGGED_EVERY == 0

    @property
    def profiled_step(self) -> int:
        """The last step that is not logged; 0 without a profile."""
        if not self.profiled:
            return 0
        return self.steps - 1 if self.is_logged(self.steps) else self.steps

    def timed(self, logged: bool) -> list[int]:
        """The steps that say how long one takes, logged or plain, without those that compile and tune."""
        spoiled = {self.profiled_step, self.profiled_step + 1} if self.profiled else set()
        kept = [n for n in range(1, self.steps + 1) if self.is_logged(n) == logged and n not in spoiled]
        return kept[1:] if logged else kept[WARM_UP:]


@dataclass
class Launch:
    """Parts that one start of as many processes as GPUs does in turn.

    Attributes:
        gpus: numbers of the GPUs.
        parts: in the order in which they are done.
    """

    gpus: list[int]
    parts: list[Part] = field(default_factory=list)


# One batch a step, and what checkpointing saves is not needed on a GPU of 141 GB.
_FILLED = {"rows": 8, "accumulated": 1, "checkpointing": False}


def plan(gpus: int, steps: int, short: int) -> list[list[Launch]]:
    """Stages one after the other, each of launches at the same time, the most telling first.

    Args:
        gpus: all that are used: an even number.
        steps: of the run whose steps are profiled and which the killed one is compared with.
        short: of the others.
    """
    every, saved = list(range(gpus)), steps // 2
    killed = "killed"
    # Blocks of one size and batch are compiled once a launch; those of the first launch for the first time.
    first = [
        Part(WHOLE, "1.3b", "fsdp2", gpus, steps, profiled=True, limit=240, least=90),
        Part("ddp", "1.3b", "ddp", gpus, short),
        Part(killed, "1.3b", "fsdp2", gpus, steps, save_at=saved, kill_at=saved + LOGGED_EVERY - 1),
    ]
    singles = [
        [Part("one", "1.3b", "alone", 1, short)],
        [Part("one 2.7b", "2.7b", "alone", 1, short, limit=120)],
        [Part("one filled", "1.3b", "alone", 1, short, **_FILLED)],
    ]
    # one beside the other as far as there are GPUs
    second = [Launch([n], parts) for n, parts in enumerate(singles[:gpus])]
    for parts in singles[gpus:]:
        second[0].parts += parts
    last = [
        Part("resumed", "1.3b", "fsdp2", gpus, steps, save_at=saved, resumes=killed),
        Part("2.7b", "2.7b", "fsdp2", gpus, short, limit=120),
        Part("filled", "1.3b", "fsdp2", gpus, short, profiled=True, **_FILLED),
        Part("2.7b ddp", "2.7b", "ddp", gpus, short, limit=120),
        Part("ddp filled", "1.3b", "ddp", gpus, short, **_FILLED),
        Part("2.7b filled", "2.7b", "fsdp2", gpus, short, rows=4, accumulated=2, checkpointing=False),
    ]
    stages = [[Launch(every, first)], second, [Launch(every, last)]]
    if gpus >= 4:
        stages.append([Launch([0, 1], [Part("two", "1.3b", "fsdp2", 2, short)])])
    return stages
