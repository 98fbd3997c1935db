import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_the_readme_points_to_is_there():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
