"""The shipped checkpoint under other versions of transformers (`-m versions`; `make test-versions` prints the table).

The tests of the comparison itself belong to the default suite: a check that cannot fail would prove nothing.
"""

import os

import pytest
import torch

from versions import run


NAMES = os.environ.get("AGEVLM_VERSIONS", "").split() or [*run.TOO_OLD, *run.TESTED]


@pytest.fixture(scope="module")
def rows() -> dict[str, run.Row]:
    """Name -> row, all measured at once."""
    try:
        run.released()
    except run.IndexUnreachable as error:
        pytest.skip(str(error))
    versions = {name: run.resolve(name) for name in NAMES}
    measured = {row.version: row for row in run.check(list(versions.values()))}
    return {name: measured[version] for name, version in versions.items()}


@pytest.mark.versions
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_checkpoint_runs_or_is_refused(rows, name):
    assert rows[name].failures == {}


REFERENCE = {
    "generate/tokens": torch.tensor([[3, 5]]),
    "forward/logits": torch.tensor([0.5, 20.0]),
    "forward/mask": torch.tensor([True, False]),
}


@pytest.mark.parametrize(
    "changed, failures",
    [
        ({}, {}),
        ({"forward/logits": torch.tensor([0.500009, 20.0])}, {}),
        ({"forward/logits": torch.tensor([0.501, 20.0])}, {"forward": "`logits` differs from the reference by 0.001"}),
        (
            {"forward/logits": torch.tensor([float("nan"), 20.0])},
            {"forward": "`logits` differs from the reference by nan"},
        ),
        ({"generate/tokens": torch.tensor([[3, 4]])}, {"generate": "`tokens` differs from the reference: [3, 4]"}),
        ({"forward/mask": torch.tensor([True, True])}, {"forward": "`mask` differs from the reference: [True, True]"}),
        ({"forward/logits": torch.ones(3)}, {"forward": "`logits` is torch.float32 (3,), not torch.float32 (2,)"}),
        ({"generate/tokens": None}, {"generate": "this version returns no `tokens`"}),
        ({"beams/tokens": torch.tensor([[3]])}, {"beams": "the reference returns no `tokens`"}),
    ],
    ids=str,
)
def test_a_difference_fails_its_probe(changed, failures):
    tensors = {name: value for name, value in {**REFERENCE, **changed}.items() if value is not None}
    row = run.Row("5.99.0", probes=3)
    run.compare(row, tensors, REFERENCE)
    assert row.failures == failures
    assert ("passes" in run.table([row])) == (not failures)


def test_a_failed_probe_keeps_its_own_error():
    row = run.Row("5.99.0", probes=3, failures={"forward": "TypeError: cache"})
    run.compare(row, {"generate/tokens": REFERENCE["generate/tokens"]}, REFERENCE)
    assert row.failures == {"forward": "TypeError: cache"}
