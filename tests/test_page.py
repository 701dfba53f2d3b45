"""The page of a report: one file that shows everything, whatever runs are called, and sorts in a browser."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib.image
import pytest
from matplotlib.figure import Figure

import report
from lrrl_utils import figures
from tests.studies import write_run

EVIL = '</td><script>alert(1)</script><img src="//x.y/z" onerror=alert(1)>"\'&{{ 7 * 7 }}\x1b[31m'
SHOWN = EVIL.removesuffix("\x1b[31m")
ROUNDS = "round,global_step,arm,learning_rate,performance,feedback,p_0,p_1\n"
ROUNDS += "1,500,0,0.0001,1,0,0.5,0.5\n2,1000,1,0.001,1,0,0.5,0.5\n"


class Page(HTMLParser):
    """Tables as lists of rows of cells, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.text, self.cell = [], [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell.strip())
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell += data


def make_study(folder):
    before = {"num_envs": 1, "num_steps": 100, "learning_rates": [1e-4, 1e-3], EVIL: EVIL}
    for seed in (1, 2):
        for task in ("A-v0", SHOWN):
            write_run(folder, task, seed, 5000.0 + seed, lr_control="constant", **before)
            write_run(folder, task, seed, 4000.0, lr_control="constant", learning_rate=1e-3, **before)
            write_run(folder, task, seed, 1234.5 * seed, rounds=ROUNDS, **before)
    write_run(folder, "A-v0", 3, 900.0, bandit=EVIL, rounds=ROUNDS, **before)
    write_run(folder / EVIL.replace("/", "|"), "A-v0", 1, 70.0, **before, exp_name=EVIL)
    write_run(folder, "A-v0", 4, 70.0, status="interrupted", **before)
    (write_run(folder, "A-v0", 5, 70.0) / "config.json").write_text(EVIL)
    summary = folder / "A-v0__0" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {EVIL: EVIL, "deep": [[[1]]], "long": 10**4000}))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with malicious names, and its report."""
    folder = tmp_path_factory.mktemp("pages") / "study"
    make_study(folder)
    report.main([str(folder), "--normalize", "--baseline", "constant 0.0003"])
    return folder


@pytest.fixture(scope="module")
def page(study):
    return Page((study / "report.html").read_text())


def test_no_name_gets_out_of_its_place(page):
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == 1 and "49" not in re.findall(r"\{\{.*?\}\}|49", page.text.replace(SHOWN, ""))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)


def test_it_needs_nothing_but_itself(page):
    names = {"src", "href", "srcset", "data", "action"}
    links = [x for _, attributes in page.tags for name, x in attributes.items() if name in names]
    assert links and all(x.startswith(("#", "data:image/png;base64,")) for x in links)
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_figures_are_there_as_pictures_with_texts_and_as_files(page, study):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    names = ["curves", "curves_all", "profiles", "costs", "improvement", "rates"]
    assert len(images) == len(names) and all(len(image["alt"]) > 30 for image in images)
    for name, image in zip(names, images):
        assert base64.b64decode(image["src"].split(",")[1]) == (study / f"{name}.png").read_bytes()
        assert matplotlib.image.imread(study / f"{name}.png").std() > 0.05
        assert (study / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_it_has_every_run_and_every_gap(page):
    *tables, missing, left_out, runs = page.tables
    assert len(tables) == 5 and len(runs) == 1 + 14 and len(left_out) == 1 + 2
    assert runs[0][:6] == ["task", "variant", "seed", "status", "final_return", "auc"] and "lr_control" in runs[0]
    shown = {tuple(row[2:6]) for row in runs[1:]}
    assert shown >= {("1", "finished", "1,234", "617"), ("2", "finished", "2,469", "1,234")}
    assert "num_steps" not in runs[0] and "num_steps" in page.text  # shared by all
    known = {row[0].split("__")[1]: row[2:] for row in left_out[1:]}
    assert ["A-v0", "4", "interrupted", "1000"] in known.values() and ["", "", "", ""] in known.values()
    assert any(row[0] == "A-v0" and row[2] == "3" for row in missing[1:])


def test_headers_are_buttons(page):
    headers = [i for i, (tag, _) in enumerate(page.tags) if tag == "th"]
    assert headers and all(page.tags[i + 1] == ("button", {"type": "button"}) for i in headers)


@pytest.fixture
def browse(study, tmp_path):
    """browse(script, width) is the page in Chromium after a script."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")

    def browse(script, width=1200):
        (tmp_path / "page.html").write_text((study / "report.html").read_text() + f"<script>{script}</script>")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
        command += [f"--window-size={width},900", "--dump-dom", f"file://{tmp_path}/page.html"]
        return Page(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)

    return browse


@pytest.mark.parametrize("width", [500, 1600])
def test_it_fits_into_a_narrow_and_a_wide_window(width, browse):
    page = browse(
        "const {clientWidth: w, scrollWidth: s} = document.documentElement; document.body.id = w + ' ' + s", width
    )
    ((tag, attributes),) = [(tag, attributes) for tag, attributes in page.tags if tag == "body"]
    shown, whole = map(int, attributes["id"].split())
    assert whole == shown and width - 50 < shown <= width


def test_a_click_on_a_header_sorts_up_and_down(browse):
    click = "document.querySelectorAll('table')[0].querySelectorAll('th button')[{}].click();"
    for column, times in ((3, 1), (3, 2), (1, 1)):
        sorted_page = browse(times * click.format(column))
        header = [attributes for tag, attributes in sorted_page.tags if tag == "th"][column]
        assert header["aria-sort"] == ("ascending" if times == 1 else "descending")
        cells = [row[column] for row in sorted_page.tables[0][1:]]
        assert len(cells) == 8
        if column == 3:  # 5,002 [5,001, 5,002], 1,852 [1,234, 2,469]
            cells = [float(cell.split(" [")[0].replace(",", "")) for cell in cells]
        assert cells == sorted(cells, key=str.lower if column == 1 else None, reverse=times == 2)
        assert column == 3 or cells.index("constant 0.0003") < cells.index("constant 0.001")


def test_without_bandits_baselines_and_a_scale_there_are_curves_only(tmp_path):
    write_run(
        tmp_path, "A-v0", 1, 10.0, lr_control="constant", rounds="round,global_step,arm,learning_rate\n1,900,,3e-4\n"
    )
    (tmp_path / "rates.png").write_bytes(b"of somebody")
    report.main([str(tmp_path)])
    page = Page((tmp_path / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("img") == 1 and "Warnings" not in page.text
    assert (tmp_path / "rates.png").read_bytes() == b"of somebody"


def test_names_in_figures_are_no_formulas(tmp_path, monkeypatch):
    texts, savefig = [], Figure.savefig

    def keep_texts(figure, *args, **kwargs):
        texts.extend([*(t for legend in figure.legends for t in legend.get_texts()), *(a.title for a in figure.axes)])
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep_texts)
    name = r"$\frac{$"
    write_run(tmp_path, name, 1, 10.0, bandit=name, rounds=ROUNDS, learning_rates=[1e-4, 1e-3])
    report.main([str(tmp_path)])
    assert {f"{name}, 1 seed", name} <= {text.get_text() for text in texts}
    assert figures.plt.rcParams["text.parse_math"]  # as before


def test_a_legend_tells_what_a_population_costs():
    run, population = SimpleNamespace(config={}), SimpleNamespace(config={"population": 4})
    assert figures.legend_of("a", run, 1) == "a, 1 seed" and figures.legend_of("a", run, 2, 2) == "a, 2 seeds"
    assert figures.legend_of("a", run, 3, 1, 2) == "a, 1 to 3 seeds"  # one line, of tasks that have not the same
    assert figures.legend_of("pb2", population, 2) == "pb2, 2 seeds, 4 times the timesteps"
