"""Tracking's outbox under backends that refuse or hang, full disks, kills, Ctrl-C, forks: all arrives just once."""

import contextlib
import json
import logging
import os
import resource
import select
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from mhc_torch.tracking import records
from mhc_torch.tracking.outbox import Interrupts, Outbox

LIMIT_S = 60.0  # for what takes a second


def trial(seed: int) -> None:
    """A process hands over numbered records while things happen to it; what arrived and what was kept is counted."""
    draw = np.random.default_rng(seed)
    plan = {
        "seed": seed,
        "count": int(draw.choice([0, 1, 10, 300, 3000])),
        "refused": float(draw.choice([0, 0, 0.1, 1])),
        "slow": float(draw.choice([0, 0.05])),
        "hang": int(draw.integers(0, 3000)) if draw.random() < 0.3 else None,
        "arrives": bool(draw.random() < 0.5),  # the record over which it hangs
        "memory": int(draw.choice([0, 2000, 2**24])),
        "disk": int(draw.choice([0, 500, 20_000])) if draw.random() < 0.3 else None,
        "forks": bool(draw.random() < 0.2),
    }
    signals = [signal.SIGINT] * int(draw.integers(0, 4)) if draw.random() < 0.4 else []
    if draw.random() < 0.2:
        signals.append(signal.SIGKILL)
    pauses = draw.exponential(0.03, len(signals))

    with tempfile.TemporaryDirectory() as folder:
        unsent = Path(folder, "unsent", "n.jsonl")
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            _hand_over(plan, unsent, writing)
        os.close(writing)
        text = _read(reading, child, list(zip(pauses, signals, strict=True)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = status == -signal.SIGKILL and signal.SIGKILL in signals
        assert killed or status == 0, f"{plan}: the process ended with {status}: ...{text[-200:]}"
        lines = unsent.read_text().splitlines(keepends=True) if unsent.exists() else []
        _check(plan, text, lines, killed=killed, interrupted=signal.SIGINT in signals)
        assert os.listdir(folder) in ([], ["unsent"])
        assert not unsent.parent.exists() or set(os.listdir(unsent.parent)) <= {unsent.name}, "temporary files are left"


def _check(plan: dict[str, Any], text: str, lines: list[str], *, killed: bool, interrupted: bool) -> None:
    words = [line.split() for line in text.splitlines()]
    sent = [int(word[1]) for word in words if word[0] == "sent"]
    kept = [json.loads(line) for line in lines]
    assert all(line.endswith("\n") for line in lines)
    numbers = [record["step"] for record in kept]
    assert sent == sorted(set(sent)), f"{plan}: sent out of order or twice"
    assert numbers == sorted(set(numbers)), f"{plan}: kept out of order or twice"
    unknown = {record["step"] for record in kept if "may have arrived" in record["error"]}
    assert len(unknown) <= 1, plan
    both = set(sent) & set(numbers) - unknown
    assert not both, f"{plan}: {sorted(both)[:5]}... were both sent and kept"
    for record in kept:
        assert record["metrics"] == {"loss": record["step"] / 7, "bad": "x"}, f"{plan}: kept as {record}"
    assert not [word for word in words if word[0] == "fork" and word[1] != "refused"], plan
    if killed:
        return
    ((_, handed, gone),) = [word for word in words if word[0] == "closed"]
    missing = set(range(int(handed))) - set(sent) - set(numbers)
    in_doubt = words.count(["start"]) - 1  # a call that Ctrl-C ended may have handed its record over
    arrived = plan["hang"] is not None and plan["arrives"]  # though it was given up
    assert int(gone) - arrived <= len(missing) <= int(gone) + in_doubt, (
        f"{plan}: {len(missing)} of {handed} records are lost, {gone} were said to be"
    )
    assert not int(gone) or plan["disk"] is not None, plan
    if not interrupted and plan["hang"] is None:
        assert ["end"] in words, f"{plan}: the run was not ended"


def _read(reading: int, child: int, events: list[tuple[float, int]]) -> str:
    """What the child says, while the signals are sent to it."""
    text, end = b"", time.monotonic() + LIMIT_S
    due = None  # from the child's first word on
    while True:
        now = time.monotonic()
        if now > end:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"the process hangs; it said ...{text[-200:]!r}")
        if due is not None and events and now >= due + events[0][0]:
            due = now
            os.kill(child, events.pop(0)[1])
        if select.select([reading], [], [], 0.002)[0]:
            if not (part := os.read(reading, 2**16)):
                os.close(reading)
                return text.decode()
            text += part
            due = due or now


def _hand_over(plan: dict[str, Any], unsent: Path, writing: int) -> None:
    """The child."""
    status = 1
    try:
        signal.signal(signal.SIGINT, _interrupt)
        logging.disable()
        records.MEMORY = plan["memory"]
        if plan["disk"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan["disk"], plan["disk"]))

        def say(text: str) -> None:
            os.write(writing, text.encode() + b"\n")

        fate = np.random.default_rng(plan["seed"]).random((2, plan["count"]))
        hung = threading.Event()

        def send(method: str, arguments: dict[str, Any]) -> None:
            if method == "end":
                say("end")
                return
            step = arguments["step"]
            if fate[1, step] < plan["slow"]:
                time.sleep(0.001)
            if step == plan["hang"]:
                if plan["arrives"]:
                    say(f"sent {step}")
                hung.wait()
            if fate[0, step] < plan["refused"]:
                raise SystemExit("no") if step % 2 else ValueError("no")
            say(f"sent {step}")

        handed, steps = 0, iter(range(plan["count"]))
        outbox = Outbox("b", send, lambda: None, unsent, 0.3)
        closed = False
        while not closed:
            with contextlib.suppress(KeyboardInterrupt):
                _armed.add(True)
                say("start")
                for step in steps:
                    outbox.put("log_metrics", {"metrics": {"loss": step / 7, "bad": "x"}, "step": step})
                    handed = step + 1
                    if plan["forks"] and step == plan["count"] // 2:
                        _fork(outbox, say)
                with Interrupts() as interrupts:
                    outbox.close("end", {}, interrupts)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                closed = True
        say(f"closed {handed} {outbox.gone}")
        status = 0
    except BaseException as error:
        os.write(writing, f"failed {error!r}\n".encode())
    finally:
        os._exit(status)


def _fork(outbox: Outbox, say: Any) -> None:
    # Ctrl-C in what Python does around a fork would leave the lock of `logging` taken for ever.
    _armed.clear()
    child = os.fork()
    if child == 0:
        try:
            outbox.put("log_metrics", {"metrics": {}, "step": -1})
            say("fork accepted")
        except RuntimeError:
            say("fork refused")
        finally:
            os._exit(0)
    _armed.add(True)
    os.waitpid(child, 0)


_armed: set[bool] = set()


def _interrupt(number: int, frame: Any) -> None:
    """KeyboardInterrupt, but not while this harness deals with the last one."""
    if _armed:
        _armed.clear()
        raise KeyboardInterrupt
