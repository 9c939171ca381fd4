"""Classes that users write: what is wrong with one is told in one line, which names the class and the method."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor
from user_classes import CLASSES

from experiments.tools import serial_replay, sweep
from sim.replay import main
from sim.user_code import UserCodeError, blaming, require_methods


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "theirs.py"
    path.write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "theirs", raising=False)
    return path


def _line(text: str) -> int:
    return CLASSES.split("\n").index(text) + 1


@pytest.mark.parametrize(
    ("option", "name", "method", "reason", "way"),
    [
        (
            "routing",
            "Routing",
            "choose",
            "IndexError: list index out of range",
            ["        return self.first(replicas)", "        return replicas[len(replicas)]"],
        ),
        (
            "routing",
            "Refuses",
            "choose",
            "ValueError: not this one",
            ['        raise ValueError("not this one")'],
        ),
        (
            "routing",
            "Inherits",
            "choose",
            "TypeError: LeastLoaded.choose() missing 1 required positional argument: 'replicas'",
            ["        return super().choose(request)"],
        ),
        ("policy", "Policy", "victim", "KeyError", ["        raise KeyError"]),
        ("policy", "Stops", "victim", "StopIteration", ["        return next(iter(()))"]),
        ("policy", "StopsSplitting", "split", "StopIteration", ["        raise StopIteration"]),
        ("policy", "RaisesOdd", "victim", "Odd: one", ['        raise Odd("one", "two")']),
        ("policy", "Exits", "victim", "SystemExit", ["        raise SystemExit"]),
        (
            "routing",
            "StopsRouting",
            "choose",
            "StopIteration",
            ["        return next(replica for replica in replicas if replica is None)"],
        ),
        ("cost", "Exit", "step", "SystemExit: 0", ["        raise SystemExit(0)"]),
        (
            "cost",
            "Cost",
            "step",
            "ZeroDivisionError: integer division or modulo by zero",
            ["        return 10**9 // self.left"],
        ),
    ],
)
def test_what_a_users_class_raises_is_said_to_be_its_own(
    tmp_path: Path,
    theirs: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    method: str,
    reason: str,
    way: list[str],
) -> None:
    arguments = ["synthetic", "--num-requests", "60", "--num-blocks", "40", "--no-figures"]
    arguments += ["--system-prompts", "3", "--system-prompt-tokens", "128"]
    if option == "routing":
        arguments += ["--num-replicas", "2"]
    assert main([*arguments, f"--{option}", f"theirs:{name}", "--out", str(tmp_path / "out")]) == 2
    first, *below = capsys.readouterr().err.splitlines()
    assert first == f"error: {option} (theirs:{name}) failed in {method}: {reason}"
    assert below[0] == "Traceback (most recent call last):"
    assert below[-1] in (reason, f"theirs.{reason}")
    frames = [line for line in below if line.startswith("  File ")]
    expected = [f'  File "{theirs}", line {_line(text)}, in ' for text in way]
    assert all(frame.startswith(start) for frame, start in zip(frames, expected, strict=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        (
            "routing",
            "Missing",
            "choose must take (request, replicas), as sim.cluster.routing.RoutingPolicy.choose",
        ),
        ("policy", "Undone", "released (None) must be a method"),
        ("cost", "Hides", "windows must be set in __init__, after RooflineCost's, which sets its own"),
        ("policy", "Unaware", "hit must take (extent), as allocator.eviction.policy.EvictionPolicy.hit does"),
        ("cost", "Short", "step must take (batch), as sim.cost.StepCost.step does"),
        ("cost", "Seconds", "step (0.5) must be an integer"),
        ("cost", "Single", "decode_affine (5) must be (base, slope), or None"),
        ("cost", "Windowed", "windows (4096,) and window_slopes () must be equally many"),
        ("cost", "Window", "windows (4096) must be a tuple"),
    ],
)
def test_what_does_not_fit_is_found_out_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str, said: str
) -> None:
    arguments = ["synthetic", "--num-requests", "5", "--num-replicas", "2", f"--{option}", f"theirs:{name}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} (theirs:{name}): {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Negative", "step (-1) must be at least 0"),
        ("Never", "step (10000000000000000000000000) must be at most 9000000000000000000 picoseconds"),
        ("Late", "base of decode_affine (1.5) must be an integer"),
        (
            "Inconsistent",
            "decode_affine (1000000000, 1) must say what step does, but of 2 sequences with 1 keys each they say "
            "1000000002 and 1000000000",
        ),
        ("Shrinking", "slope of decode_affine (-1) must be at least 0"),
    ],
)
def test_what_a_cost_answers_later_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    arguments = ["synthetic", "--num-requests", "60", "--requests-per-s", "100", "--cost", f"theirs:{name}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: cost (theirs:{name}): {said}\n"


@pytest.mark.parametrize(
    ("option", "name", "failed"),
    [
        ("policy", "Looks", "released: KeyError: 'which'"),
        ("cost", "Unknown", "windows: OSError: unknown"),
        ("cost", "Unmade", "step: AttributeError: 'Unmade' object has no attribute '_full_slope'"),
    ],
)
def test_what_is_raised_before_the_run_is_the_users_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str, failed: str
) -> None:
    arguments = ["synthetic", "--num-requests", "5", f"--{option}", f"theirs:{name}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} (theirs:{name}) failed in {failed}\n")


def test_integers_of_any_type_are_a_cost(tmp_path: Path) -> None:
    arguments = ["synthetic", "--num-requests", "40", "--requests-per-s", "100", "--no-figures"]
    for name in ("Integers", "Plain"):
        assert main([*arguments, "--cost", f"theirs:{name}", "--out", str(tmp_path / name)]) == 0
    for kind in ("requests", "timeline"):
        first, second = ((tmp_path / name / f"{kind}.parquet").read_bytes() for name in ("Integers", "Plain"))
        assert first == second


def test_other_commands_say_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_reusable_executor().shutdown()  # workers of an earlier sweep do not look into this one's folder
    replay = ["synthetic", "--num-requests", "60", "--num-blocks", "40"]
    arguments = ["--out", str(tmp_path / "sweep"), "--vary", "policy=lru,theirs:Policy", "--", *replay]
    assert sweep.main(arguments) == 2
    assert "error: policy (theirs:Policy) failed in victim: KeyError\n" in capsys.readouterr().err
    trace = tmp_path / "mooncake.jsonl"
    rows = (
        f'{{"timestamp": {i}, "input_length": 900, "output_length": 1, "hash_ids": [{i}, {-i}]}}\n'
        for i in range(1, 9)
    )
    trace.write_text("".join(rows).replace("-", "9"))
    assert serial_replay.main([str(trace), "--num-blocks", "3", "--policies", "theirs:Policy"]) == 2
    assert capsys.readouterr().err.startswith("error: policy (theirs:Policy) failed in victim: KeyError\n")


def test_errors_of_nobodys_class_pass_through() -> None:
    for name in ("lru", "theirs:Policy", "builtins:print"):
        with pytest.raises(KeyError, match="ours"), blaming(policy=name):
            raise KeyError("ours")
        with pytest.raises(TypeError, match="Other"), blaming(policy=name):
            raise TypeError("Other.victim() takes 1 positional argument but 2 were given")
    with (
        pytest.raises(
            UserCodeError, match=r"^policy \(theirs:Policy\) failed in victim: TypeError: LRU\.vic"
        ),
        blaming(policy="theirs:Policy"),
    ):
        raise TypeError("LRU.victim() takes 1 positional argument but 2 were given")


def test_an_error_survives_the_way_from_another_process() -> None:
    error = pickle.loads(
        pickle.dumps(UserCodeError("routing (a:B) failed in choose: KeyError: 1", "the way"))
    )
    assert (str(error), error.trace) == ("routing (a:B) failed in choose: KeyError: 1", "the way")


def test_methods_may_be_called_as_the_contract_says() -> None:
    class Contract:
        def given(self, first: int, second: int) -> None: ...

    class More:
        def given(self, first: int, *rest: int, extra: int = 0) -> None: ...

    class Less:
        def given(self, first: int) -> None: ...

    class Static:
        @staticmethod
        def given(one: int, other: int) -> None: ...

    for fine in (Contract(), More(), Static(), object()):
        require_methods("option", "a:B", fine, Contract)
    with pytest.raises(
        ValueError, match=r"^option \(a:B\): given must take \(first, second\), as .*Contract"
    ):
        require_methods("option", "a:B", Less(), Contract)
