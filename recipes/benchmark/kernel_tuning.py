"""Triton's tuning of a kernel, with all its variants compiled at once before they are timed one by one.

Tuning mamba-ssm's kernels takes two minutes, most of it the compiler on one core. What is chosen, and how,
stays as it is.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["compile_ahead"]


def compile_ahead(threads: int) -> None:
    """Let every tuning in this process compile its variants in so many threads first.

    A variant that does not compile here is left to the tuning, which knows what to make of it.
    """
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
    from triton.runtime.autotuner import Autotuner

    pool, timed = ThreadPoolExecutor(threads), Autotuner._bench

    def compiled(tuner: Autotuner, args: tuple, meta: dict[str, Any]) -> None:
        meta = {key: value for key, value in meta.items() if key != "warmup"}
        with AsyncCompileMode(pool, ignore_errors=True):
            for config in tuner.configs:
                tuner.fn.warmup(*args, **meta | config.all_kwargs())

    def _bench(self: Autotuner, *args: Any, config: Any, **meta: Any) -> Any:
        if config is self.configs[0]:  # a tuning begins
            try:
                compiled(self, args, meta)
            except Exception as error:
                active_mode.set(None)
                print(f"{self.base_fn.__name__} is compiled as it is tuned: {error!r}", flush=True)
        return timed(self, *args, config=config, **meta)

    Autotuner._bench = _bench
