"""A page in headless Chromium: its final DOM (without scripts), console messages and network requests."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@dataclass(frozen=True)
class Visit:
    dom: str
    console: list[str]
    requests: list[str]


def visit(page: Path, folder: Path) -> Visit:
    """Open a local page and wait for its scripts; WebGL is rendered in software."""
    log = folder / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-gpu",
        "--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,4800",
        "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--log-net-log={log}", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and not _is_advice(line)]
    markup = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    return Visit(markup, console, _requests(log))


def _is_advice(line: str) -> bool:
    """Chromium's remarks on the speed of software rendering."""
    return "Canvas2D: Multiple readback" in line or "GL Driver Message (OpenGL, Performance" in line


def _requests(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8").rstrip()
    events = json.loads(text if text.endswith("}") else text.rstrip(",\n") + "]}")["events"]
    parameters = [event.get("params", {}) for event in events]
    # What the browser asks for itself (its update service) has no origin.
    urls = (p["url"] for p in parameters if "url" in p and p.get("initiator", "not an origin") != "not an origin")
    return sorted({url for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))})
