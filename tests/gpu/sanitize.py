"""A small run of every kernel for compute-sanitizer: one allocation a tensor, so that it sees every bound.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python tests/gpu/sanitize.py
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from neurons import SignedSpikeCount  # noqa: E402
from tests.helpers.kernel_parity import Case, check_compensated, check_count, check_multi_step  # noqa: E402

SHAPES = [(1, (2051,)), (1, (4096,)), (3, (2056,)), (2, (4096,)), (5, (77,)), (37, (70,)), (70, (64,))]


def decoding() -> None:
    """A few tokens of event-driven models, as single launches."""
    from spiking_mamba.model.cuda.token import FusedToken, own_cache
    from tests.gpu.test_event_driven import INTEGER, MLPS, ids_of, made_of

    with torch.no_grad():
        for spec, weights, fields in (
            (INTEGER, "int8", {"n_groups": 2}),
            (INTEGER, "int4", MLPS),
            (None, "int8", {}),
        ):
            made = made_of(spec, weights, **fields).cuda()
            for rows in (1, 3, 8):
                ids = ids_of(rows, 6).cuda()
                cache = own_cache(made(ids[:, :4], use_cache=True).cache, torch.bfloat16)
                token = FusedToken(made)
                for one in ids[:, 4:].split(1, 1):
                    token(one, cache)
    torch.cuda.synchronize()
    print("sanitize: decoding passed")


def main() -> None:
    if "--decoding" in sys.argv:
        decoding()
        return
    cases = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for T, shape in SHAPES:
            for options in ({}, {"tau": 3.0, "v_threshold": 0.3, "initial_v": True, "store_v_seq": True}):
                check_multi_step(Case(T, shape, dtype, **options), "cuda", "cpu")
                cases += 1
        check_multi_step(Case(3, (1024,), dtype, offset=1), "cuda", "cpu")
        check_count(torch.randn(2051, device="cuda").to(dtype), 1.0, SignedSpikeCount())
        check_compensated(
            torch.randn(2051, device="cuda").to(dtype), SignedSpikeCount(), "blend", "tanh", 0.5
        )
        cases += 3
    torch.cuda.synchronize()
    print(f"sanitize: {cases} cases passed")


if __name__ == "__main__":
    main()
