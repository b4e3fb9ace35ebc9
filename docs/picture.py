"""Makes docs/images/smollm2.png, the README's picture: `make picture` (needs Chromium)."""

import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from sd_lens import default_texts, errors, figures, find_high_norm_tokens, load_model, singular_defects

TARGET = Path(__file__).parent / "images" / "smollm2.png"
WIDTH, HEIGHT = 1000, 940


def main():
    """Draw the norms and the angles of SmolLM2, one above the other."""
    warnings.simplefilter("ignore", errors.SmallGapWarning)
    model = load_model("smollm2-135m")
    found = find_high_norm_tokens(model, default_texts())
    defects = singular_defects(model)
    marks = {"explosion_layers": found.explosion_layers, "decay_layers": found.decay_layers}
    drawn = [figures.layer_norms(found), figures.direction_angles(defects, found.direction, **marks)]
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(
            "".join(
                figure.update_layout(width=WIDTH, height=HEIGHT // 2).to_html(
                    full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False}
                )
                for number, figure in enumerate(drawn)
            ),
            encoding="utf-8",
        )
        command = [
            shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=10000", f"--screenshot={TARGET}", page.as_uri(),
        ]  # fmt: skip
        TARGET.parent.mkdir(exist_ok=True)
        subprocess.run(command, check=True, capture_output=True)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
