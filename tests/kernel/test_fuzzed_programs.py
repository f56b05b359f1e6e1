"""nft, dnsmasq and haproxy accept what is rendered after any sequence of calls with valid and hostile values."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hypothesis import event, example, given, settings

from fuzz import payload_grammar as grammar
from fuzz.payload_grammar import Call, Place
from fuzz.payload_laws import play
from kernel.scratch import scratch
from netloom.render import ruleset
from netloom.render.scope import render
from netloom.render.services import services

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def test_every_ruleset_of_a_sequence_of_calls_is_loaded_by_the_kernel() -> None:
    with scratch() as namespace:

        def load(text: str) -> None:
            command = ["ip", "netns", "exec", namespace, shutil.which("nft", path=PATH) or "nft", "-f", "-"]
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, f"{done.stderr[:2000]}\n{text}"

        @settings(max_examples=40, database=None)
        @given(grammar.walks(12))
        def draw(walk: tuple[str, list[tuple[Call, Place]]]) -> None:
            rulesets = [it.ruleset for it in map(render, play(walk)) if it.ruleset is not None]
            event(f"{min(len(rulesets), 5)} rulesets")
            for before, after in zip([None, *rulesets], rulesets, strict=False):
                text = ruleset.fresh(after) if before is None else ruleset.swap(before, after)
                if text:
                    load(text)

        draw()


def test_dnsmasq_and_haproxy_accept_what_is_rendered_after_a_sequence_of_calls(tmp_path: Path) -> None:
    file = tmp_path / "configuration"
    checks = {
        "dnsmasq.conf": [shutil.which("dnsmasq", path=PATH) or "dnsmasq", "--test", f"--conf-file={file}"],
        "haproxy.cfg": [shutil.which("haproxy", path=PATH) or "haproxy", "-c", "-f", str(file)],
    }
    accepted: set[str] = set()
    begin = [
        (Call(command, grammar.as_json(it)), grammar.PLACES["vpc-7"][0]) for command, it in grammar.BEGINNINGS["vpc-7"]
    ]

    @settings(max_examples=40, database=None)
    @given(grammar.walks(12))
    @example(("vpc-7", begin))
    def draw(walk: tuple[str, list[tuple[Call, Place]]]) -> None:
        for service in (it for scope in play(walk) for it in services(scope)):
            for name, text in service.config.items():
                if text in accepted:
                    continue
                file.write_text(text)
                done = subprocess.run(checks[name], capture_output=True, text=True, timeout=60, check=False)
                assert done.returncode == 0, f"{done.stderr[:2000]}\n{text}"
                accepted.add(text)

    draw()
    assert len(accepted) > 1
