"""Tests of the report: the data read from DVC's revisions, and the page in a browser."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc_project import ROOT, build_environment, run_command
from report_cases import (
    HOSTILE,
    make_compared_tasks,
    make_figures,
    make_grouped_runs,
    make_revisions,
    make_runs,
    read_texts,
)

from tools.report_data import (
    ReportRun,
    build_flow,
    get_curve_path,
    group_identical_runs,
    parse_curve,
    read_live_runs,
    read_runs,
)
from tools.report_page import (
    build_bars,
    build_curves,
    build_group_tables,
    build_metric_columns,
    build_score_tables,
    choose_metrics,
    render_page,
    render_samples,
)
from tools.report_pairs import build_compared_parts, build_plot_points

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def list_names(found: list[Any]) -> list[str]:
    return [report_run.name for report_run in found]


def test_runs_are_workspace_commits_and_experiments() -> None:
    assert [(report_run.name, report_run.kind) for report_run in make_runs()] == [
        ("workspace", "workspace"),
        ("main", "commit"),
        ("wide", "experiment"),
        (HOSTILE, "experiment"),
        ("broken", "experiment"),
        ("fffffff", "experiment"),
        ("under way", "experiment"),
        ("ddddddd", "experiment"),
    ]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("broken", "failed: Experiment run failed"),
        ("fffffff", "queued"),
        ("under way", "running"),
        ("ddddddd", "failed: no <such> commit"),
        ("main", ""),
    ],
)
def test_runs_without_results_state_the_reason(name: str, state: str) -> None:
    (found,) = (report_run for report_run in make_runs() if report_run.name == name)
    assert found.state == state
    assert bool(found.metrics) == bool(found.files) == (not state)


def test_runs_with_unreadable_metrics_have_no_metrics() -> None:
    revisions = make_revisions()
    revisions[0]["data"]["metrics"] = {
        "metrics/causal.json": {"error": {"msg": "no file", "type": "FileNotFoundError"}}
    }
    found = read_runs(revisions, read_texts)[0]
    assert (found.metrics, found.state) == ({}, "no metrics")


def read_none(rev: str, paths: list[str]) -> Iterator[str | None]:
    """Replacement of `Outs.read_texts` without any cached file."""
    yield from (None for _ in paths)


def find_run(name: str, found: list[ReportRun]) -> ReportRun:
    return next(report_run for report_run in found if report_run.name == name)


def test_runs_without_full_metrics_have_headline_metrics_with_full_names() -> None:
    found = read_runs(make_revisions(), read_none)
    wide = find_run("wide", found)
    assert wide.metrics["causal.validation.bits_per_byte"] == 2.25
    assert "causal.validation.loss" not in wide.metrics and "reports/evaluate/causal" in wide.missing
    assert find_run("wide", make_runs()).metrics["causal.validation.loss"] == 4.5
    assert build_bars("causal.validation.bits_per_byte", found).spec["data"][0]["x"] == [2.5, 2.5, 2.25, 2.75]
    assert "reports/evaluate/causal" in render_page(found)


def test_runs_of_an_earlier_version_have_the_metrics_of_its_files() -> None:
    revisions = make_revisions()
    old = {"causal": {"validation": {"bits_per_byte": 9.5}, "test": {"bits_per_byte": 9.75}}}
    revisions[1]["data"]["metrics"] = {"metrics/causal.json": {"data": old}}
    found = find_run("main", read_runs(revisions, read_none))
    assert found.metrics == {"causal.validation.bits_per_byte": 9.5, "causal.test.bits_per_byte": 9.75}
    assert "reports/evaluate/causal" not in found.missing


def test_runs_with_full_metrics_of_another_commit_have_headline_metrics() -> None:
    revisions = make_revisions()
    revisions[0]["data"]["metrics"]["metrics/causal.json"]["data"]["causal"]["val"]["bpb"] = 1.5
    metrics = read_runs(revisions, read_texts)[0].metrics
    assert metrics["causal.validation.bits_per_byte"] == 1.5 and "causal.validation.loss" not in metrics
    assert metrics["mlm.validation.loss"] == 6.4


def test_report_of_two_tasks_with_one_objective_shows_both() -> None:
    def read_packed(rev: str, paths: list[str]) -> Iterator[str | None]:
        texts = read_texts(rev, [path.replace("packed", "causal") for path in paths])
        for path, text in zip(paths, texts, strict=True):
            yield text.replace('"causal"', '"packed"') if text and "packed" in path else text

    revisions = make_revisions()
    headlines = make_figures("causal", 2.5)["metrics/causal.json"]["data"]["causal"]
    revisions[1]["data"]["metrics"]["metrics/packed.json"] = {"data": {"packed": headlines}}
    found = read_runs(revisions, read_packed)
    main = find_run("main", found)
    assert main.metrics["packed.validation.loss"] == main.metrics["causal.validation.loss"] == 5.0
    assert find_run("wide", found).missing == []  # has no such task
    assert choose_metrics(build_metric_columns(found)) == [
        "causal.validation.bits_per_byte",
        "mlm.validation.pseudo_bits_per_byte",
        "packed.validation.bits_per_byte",
    ]
    assert [list_names(members) for column in build_flow("packed", found) for members, _ in column] == [["main"]] * 4
    page = render_page(found)
    # Each task has loss, samples and data; one also has pairs.
    assert [page.count(f"<h3>{task}</h3>") for task in ("causal", "mlm", "packed")] == [4, 3, 3]
    assert "packed, validation: bits_per_byte" in page


def test_runs_list_outs_missing_from_the_cache() -> None:
    assert {report_run.name: report_run.missing for report_run in make_runs() if report_run.missing} == {
        HOSTILE: ["reports/train/mlm"]
    }


def test_runs_with_identical_files_are_grouped() -> None:
    groups = group_identical_runs(make_runs(), [get_curve_path("mlm", "train")])
    assert [list_names(members) for members, _ in groups] == [["workspace", "main"], ["wide"]]


def test_parse_curve_returns_steps_and_losses_of_dvclive() -> None:
    assert parse_curve("step\tloss\n10\t4.5\n20\t4.25\n") == [(10, 4.5), (20, 4.25)]


def test_flow_counts_each_step_and_dropped_items() -> None:
    records, documents, tokens, blocks = build_flow(
        "causal", [report_run for report_run in make_runs() if report_run.name != HOSTILE]
    )
    assert [[step.total for _, step in column] for column in (records, documents, tokens)] == [[250], [250], [125_003]]
    assert [(list_names(members), step.unit, step.total) for members, step in blocks] == [
        (["workspace", "main"], "blocks of 128 tokens", 975),
        (["wide"], "blocks of 256 tokens", 486),
    ]
    notes = " ".join(note for column in (records, tokens, blocks) for _, step in column for note in step.notes)
    for said in (
        "260 read, 10 dropped (without answers: 10)",
        "564 answers in them, 15 dropped",
        "253 of them special",
    ):
        assert said in notes
    assert [step.notes[0].split()[0] for _, step in blocks] == [str(125_003 - 975 * 128), str(125_003 - 486 * 256)]


def test_flow_without_ledgers_is_empty() -> None:
    assert build_flow("causal", [report_run for report_run in make_runs() if not report_run.files]) == []


def test_metric_columns_start_with_comparable_validation_metrics() -> None:
    columns = build_metric_columns(make_runs())
    assert [column.key for column in columns if not column.extra] == [
        "causal.validation.bits_per_byte",
        "mlm.validation.pseudo_bits_per_byte",
        "causal.test.bits_per_byte",
        "mlm.test.pseudo_bits_per_byte",
    ]
    assert choose_metrics(columns) == ["causal.validation.bits_per_byte", "mlm.validation.pseudo_bits_per_byte"]


def test_curves_have_training_and_validation_of_each_group_of_runs() -> None:
    found = build_curves("causal", make_runs())
    assert found is not None
    assert [len(trace["x"]) for trace in found.figure.spec["data"]] == [31, 4] * 3
    assert found.rows[1] == ("wide", "30", "4.2440", "4.2440 at step 30")
    assert "wide: 4.2440 at step 30" in found.figure.alt


def test_bars_show_each_run_after_and_before_training() -> None:
    figure = build_bars("causal.validation.bits_per_byte", make_runs())
    after, before = figure.spec["data"]
    assert (after["x"], before["x"]) == ([2.5, 2.5, 2.25, 2.75], [3.8] * 4)
    assert "wide 2.2500 (before training 3.8000)" in figure.alt


def test_samples_render_without_markup_from_the_model() -> None:
    pages = "".join(page for _, page in render_samples("causal", make_runs()))
    assert "<strong>Why</strong>" in pages
    assert set(re.findall(r"</?(\w+)", pages)) == {"blockquote", "p", "strong"}


def test_groups_add_no_metric_column() -> None:
    assert [report_run.metrics for report_run in make_grouped_runs()] == [
        report_run.metrics for report_run in make_runs()
    ]


def test_group_tables_cover_texts_and_groups_with_several_values() -> None:
    tables = build_group_tables("causal", make_grouped_runs())
    assert [(table.caption, table.opened) for table in tables] == [
        ("causal: bits_per_byte by text", True),
        ("causal, validation: bits_per_byte by topic", True),
        ("causal, test: bits_per_byte by topic", False),
        ("causal, text wiki: bits_per_byte by kind", False),
        ("causal, text validation: bits_per_byte by kind", False),
    ]
    topic = tables[1]
    assert topic.runs == ["workspace, main", "wide", HOSTILE]
    assert [name for name, _ in topic.rows] == ["why", HOSTILE, "rare"]
    assert [cell.text for cell in topic.rows[0][1]] == [
        *("2,600", "9,000"),
        *("3.0000 (3.8000)", "2.7500 (3.8000)", "3.2500 (3.8000)"),
    ]


def test_group_tables_without_groups_of_several_values_are_left_out() -> None:
    assert build_group_tables("mlm", make_grouped_runs()) == build_group_tables("causal", make_runs()) == []
    assert 'id="groups"' not in render_page(make_runs())
    assert 'id="groups"' in render_page(make_grouped_runs())


def test_score_tables_separate_runs_with_different_items() -> None:
    tables = build_score_tables("causal", make_runs())
    assert [(table.caption, table.runs) for table in tables] == [
        ("causal: accuracy on 12 items by log-likelihood", ["workspace, main", "wide"]),
        ("causal: accuracy by field", ["workspace, main", "wide"]),
        ("causal: accuracy on 12 items by log-likelihood", [HOSTILE]),
        ("causal: accuracy by field", [HOSTILE]),
    ]
    rows = {name: [cell.text for cell in cells] for name, cells in tables[0].rows}
    assert rows["sum"] == ["12", "16.7% (10.0% to 90.0%)", "25.0% (10.0% to 90.0%)"]
    assert list(rows) == ["sum", "per_token", "per_byte"]
    rows = {name: [cell.text for cell in cells] for name, cells in tables[1].rows}
    assert rows[HOSTILE] == ["8", "12.5% (10.0% to 90.0%)", "25.0% (10.0% to 90.0%)"]


def test_score_tables_of_a_task_without_pairs_in_params_are_left_out() -> None:
    """The workspace may still have a file of an earlier run."""
    assert build_score_tables("mlm", make_runs()) == []


def test_comparisons_show_difference_verdict_or_reason() -> None:
    (task,) = make_compared_tasks()
    parts = build_compared_parts(task)
    rows = {name: [cell.text for cell in cells] for name, cells in parts.table.rows}
    assert rows["wide"] == ["-0.0500", "-0.0709 to -0.0291", "75%", "1 and 1", "better", ""]
    assert rows["other (another seed)"][4:] == ["not decided", "more documents"]
    assert rows[HOSTILE] == ["", "", "", "", "other documents", ""]
    assert parts.figure is not None
    assert [trace["x"] for trace in parts.figure.spec["data"]] == [[-0.05], [0.02]]
    assert parts.figure.spec["data"][1]["error_x"]["array"] == [0]  # the interval of a single document is infinite
    assert "wide -0.0500, better" in parts.figure.alt
    (moved,) = parts.moved  # a comparison without changes has no details
    assert [cell.text for cell in moved.groups[0].rows[0][1]] == ["26", "-0.0500", "-0.0709 to -0.0291", "-20.0"]


def test_comparisons_color_changed_text_and_escape_control_characters() -> None:
    (moved,) = build_compared_parts(make_compared_tasks()[0]).moved
    (sentence, pieces), (_, nothing) = moved.documents
    assert sentence == f"Record 3 (q7, {HOSTILE}, 900 bytes): 21.0 bits fewer (-0.0233 per byte)"
    assert pieces == [
        ("… ", "", ""),
        ("Why ", "", ""),
        (HOSTILE, "better-3", "-1.50 bits"),
        (" </script>\\u202e\\x1b[31m", "worse-4", "+3.00 bits"),
        (" …", "", ""),
    ]
    assert nothing == []


def test_plot_points_have_difference_interval_and_verdict() -> None:
    points = build_plot_points(make_compared_tasks()[0])
    assert [(point["experiment"], point["verdict"]) for point in points] == [
        ("wide", "better"),
        ("other (another seed)", "not decided"),
    ]
    assert points[0]["low"] < points[0]["difference"] < points[0]["high"]
    assert points[1]["low"] is points[1]["high"] is None


def test_page_without_comparisons_has_no_comparison_section() -> None:
    assert 'id="comparisons"' not in render_page(make_runs())
    assert 'id="comparisons"' in render_page(make_runs(), make_compared_tasks())


def test_page_is_deterministic() -> None:
    assert render_page(make_runs()) == render_page(make_runs())


def test_page_escapes_hostile_names() -> None:
    page = render_page(make_grouped_runs(), make_compared_tasks())
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "<img" not in body and HOSTILE not in body


@pytest.mark.parametrize("repository", [False, True])
def test_report_without_results_says_which_command_to_run(tmp_path: Path, repository: bool) -> None:
    if repository:
        run_command(tmp_path, "git", "init", "-q")
        run_command(tmp_path, "dvc", "init", "-q")
        run_command(tmp_path, "git", "commit", "-q", "-m", "nothing yet")
    env = {**build_environment(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.report"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    said = "no results yet: run `dvc repro` first" if repository else "`dvc exp show` failed"
    assert done.stderr.splitlines()[-1] == f"report: {said}"
    assert not (tmp_path / "reports").exists()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render_page(make_runs()), encoding="utf-8")
    return file.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: `apt-get install chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["wide-light", "narrow-dark"])
def page(browser: Any, report: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open report; fails on any console message, error or request, also during the test."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)  # milliseconds; a busy machine is slow to load 5 MB
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.append(asked.url) if asked.url != report else None)
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(report)
    page.wait_for_selector(".plot .main-svg")
    yield page
    page.close()
    assert complaints == []


def read_column(page: Any, index: int) -> list[str]:
    cells = page.locator(f"#experiments tbody tr > :nth-child({index})")
    return [text.strip().split("\n")[0] for text in cells.all_inner_texts()]


def test_page_shows_table_and_plots_within_the_window_width(page: Any) -> None:
    assert page.locator("#experiments tbody tr").count() == 8
    assert page.locator(".plot .main-svg:first-child").count() == 4
    assert page.locator(".plot .scatterlayer .trace").count() == 2 * 2 + 3 * 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (400, "light")])
def test_page_with_groups_and_comparisons_opens_and_sorts_within_the_window_width(
    browser: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    (tmp_path / "report.html").write_text(render_page(make_grouped_runs(), make_compared_tasks()), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector(".plot .main-svg")
    tables = page.locator("#groups table")
    assert (tables.count(), page.locator("#groups table:visible").count()) == (5, 2)
    page.locator("#groups summary").nth(2).click()
    assert page.locator("#groups table:visible").count() == 3
    topic = tables.nth(1)
    topic.locator("th button").nth(3).click()
    assert topic.locator("tbody th").all_inner_texts() == [HOSTILE, "why", "rare"]
    text = page.locator("#comparisons blockquote")
    assert not text.is_visible()
    page.locator("#comparisons summary").nth(1).click()
    assert text.is_visible() and HOSTILE in text.inner_text()
    colors = [
        text.locator(f"[class|={kind}]").evaluate("piece => getComputedStyle(piece).backgroundColor")
        for kind in ("better", "worse")
    ]
    assert len({*colors, "rgba(0, 0, 0, 0)"}) == 3
    assert page.locator("#comparisons .plot .main-svg").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
    assert complaints == []


def test_page_figures_follow_the_color_scheme(page: Any) -> None:
    def colors() -> tuple[str, str, str]:
        of = "(of, what) => getComputedStyle(document.querySelector(of))[what]"
        return tuple(
            page.evaluate(f"([of, what]) => ({of})(of, what)", [selector, what])
            for selector, what in (
                ("body", "backgroundColor"),
                (".plot .main-svg", "backgroundColor"),
                (".plot .xtick text", "fill"),
            )
        )

    before = colors()
    assert before[0] == before[1]
    light = page.evaluate("matchMedia('(prefers-color-scheme: light)').matches")
    page.emulate_media(color_scheme="dark" if light else "light")
    page.wait_for_timeout(300)
    after = colors()
    assert after[0] == after[1]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_page_sorts_by_click_and_by_keyboard_with_empty_cells_last(page: Any) -> None:
    page.click("#experiments th:nth-child(2) button")
    assert read_column(page, 2) == ["32", "64", "128", "128", "256", "512", "1024", ""]
    page.keyboard.press("Enter")
    assert read_column(page, 2) == ["1024", "512", "256", "128", "128", "64", "32", ""]
    assert page.locator("[aria-sort=descending]").inner_text().strip() == "block_size"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert read_column(page, 3) == ["2.2500", "2.5000", "2.5000", "2.7500", "", "", "", ""]
    assert page.locator("[aria-sort=ascending], [aria-sort=descending]").count() == 1


def test_page_checkbox_shows_all_metrics(page: Any) -> None:
    hidden = page.locator("#experiments th.extra").first
    assert not hidden.is_visible()
    page.check("#all-metrics")
    assert hidden.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_page_mode_bar_has_no_upload_button(page: Any) -> None:
    labels = {button.get_attribute("aria-label") for button in page.locator(".modebar-btn").all()}
    assert labels == {"Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes", "Download plot as a PNG"}


def test_page_plot_zooms_by_drag_and_shows_loss_on_hover(page: Any) -> None:
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".point").nth(1).bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector(".hoverlayer text")
    assert "5.3720 at step 10" in page.locator(".hoverlayer text").all_text_contents()
    area = plot.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(area["x"] + area["width"] * 0.1, area["y"] + area["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] * 0.5, area["y"] + area["height"] * 0.9, steps=5)
    page.mouse.up()
    page.wait_for_function("document.querySelector('.plot').layout.xaxis.range[1] < 20")


def test_page_is_accessible_with_captions_and_heading_levels(page: Any) -> None:
    assert page.locator("html").get_attribute("lang") == "en"
    alts = [plot.get_attribute("aria-label") or "" for plot in page.locator("figure").all()]
    assert len(alts) == 4 and all("main" in alt for alt in alts)
    assert page.locator("table:not(.sample table):not(:has(caption))").count() == 0
    levels = [
        int(level) for level in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName[1])")
    ]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_report_of_the_pipeline_shows_experiments_curves_samples_and_ledgers(clean: Path) -> None:
    run_command(clean, sys.executable, "-m", "tools.report")
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    specs = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    curves = [trace for spec in specs for trace in spec["data"] if "mode" in trace]
    assert len(specs) == 4
    assert [trace["name"] for trace in curves] == ["main"] * 4 and all(trace["x"] for trace in curves)
    assert "as main" in page and "The reason the sky is blue is" in page and "blocks of 64 tokens" in page
    assert "not in any cache" not in page


def test_report_without_the_cache_shows_the_workspace_and_lists_missing_outs(clean: Path) -> None:
    cache = clean / ".dvc/cache"
    cache.rename(clean / ".dvc/aside")
    try:
        run_command(clean, sys.executable, "-m", "tools.report")
    finally:
        (clean / ".dvc/aside").rename(cache)
    page = (clean / "reports/report.html").read_text(encoding="utf-8")
    (missing,) = re.findall(r"<li>(.*?): (.*?)</li>", page)
    assert missing[0] == "main" and "reports/train/causal" in missing[1] and "data/raw" in missing[1]
    assert set(re.findall(r'"name": "(.*?)"', page)) >= {"workspace"}


@pytest.mark.parametrize(("runs_now", "name"), [(True, "causal (running)"), (False, "causal (interrupted)")])
def test_live_curves_are_drawn_after_the_runs(tmp_path: Path, runs_now: bool, name: str) -> None:
    directory = tmp_path / ".live-causal"
    directory.mkdir()
    (directory / "train.tsv").write_text("step\tloss\tlearning_rate\n10\t3.5\t0.1\n20\t3.25\t0.1\n30\t3.")
    live = read_live_runs(tmp_path, lambda _: runs_now)
    found = build_curves("causal", [*make_runs(), live["causal"]])
    assert found is not None and found.rows[-1] == (name, "20", "3.2500", "")  # without the incomplete last line
    assert name in render_page([], live=live)


def test_live_directory_without_curves_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".live-mlm").mkdir()
    assert read_live_runs(tmp_path, lambda _: False) == {}
