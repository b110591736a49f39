"""JupyterLab in a browser, used as a person uses it: the file browser, the menus, the keyboard and the mouse."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, TimeoutError

from tools.run_tests import CELL_TIMEOUT

LOOPBACK = {"127.0.0.1", "localhost", "::1", None}  # None: data: and blob:, which no wire carries
NOTEBOOK_TIMEOUT = 300  # seconds; a lesson should take under 60
QUIET = 5  # seconds without a running cell: after an error JupyterLab runs no more
REACTION = 60  # seconds that a picture may take to follow its control, on a busy machine
EDGE = 2  # pixels: a width is rounded

# textContent, because the innerText of what is not in view may be empty.
PROMPTS = """cells => cells
    .filter(cell => cell.querySelector('.cm-content')?.textContent.trim() !== '')
    .map(cell => cell.querySelector('.jp-InputPrompt').textContent)"""

# The words and the pixels of a widget's output. What a slider shows beside itself is no output.
LOOK = """widget => {
    const pixels = [...widget.querySelectorAll('img')].map(img => {
        const canvas = document.createElement('canvas');
        [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
        canvas.getContext('2d').drawImage(img, 0, 0);
        return canvas.toDataURL();
    });
    return [...widget.querySelectorAll('.widget-html')].map(text => text.textContent).concat(pixels).join(' ');
}"""


class Lab:
    """A page of JupyterLab.

    Attributes:
        root: the folder that it shows.
        faults: errors on the browser's console and requests to other machines, since they were last taken.
    """

    def __init__(self, context: BrowserContext, address: str, root: Path):
        self.root = root
        self.page = context.new_page()
        self.faults: list[str] = []
        self.page.on("console", self._note_message)
        self.page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._note_request(request.url))
        self.page.on("websocket", lambda socket: self._note_request(socket.url))
        self.page.goto(address)

    def open(self, path: Path) -> Notebook:
        """Opens a notebook by double clicks, from the root of the course."""
        entries = [
            self.page.locator(".jp-DirListing-item").filter(has=self.page.get_by_text(name, exact=True))
            for name in path.parts
        ]
        self._go_to_root(entries[0])
        for entry in entries:
            entry.dblclick()
        self.page.locator(f".jp-mod-current[title*='{path.name}']").wait_for()
        notebook = Notebook(self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)"), self.root / path)
        # Before the kernel is there, JupyterLab drops what is run without a word.
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        # Starting, and closing what was open before, are JupyterLab's own affair, except where they go.
        self.faults = [fault for fault in self.faults if fault.startswith("request")]
        return notebook

    def _go_to_root(self, entry: Locator) -> None:
        """Until this entry of the root is there: a click is lost where JupyterLab draws the path anew under it."""

        def there() -> bool:
            self.page.locator(".jp-BreadCrumbs-home").click()
            with suppress(TimeoutError):
                entry.wait_for(timeout=5000)
            return entry.is_visible()

        wait_for(there, REACTION, f"the root of the course: {entry}")

    def close_notebook(self) -> None:
        """With its kernel: File, Close and Shut Down Notebook."""
        self.choose("File", "filemenu:close-and-cleanup")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.locator(".jp-NotebookPanel").wait_for(state="detached")

    def choose(self, menu: str, command: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
        self.page.locator(f".lm-Menu [data-command='{command}']").first.click()

    def run_all(self, notebook: Notebook) -> None:
        """Run, Run All Cells; returns when all have run, or nothing has moved for a while after an error."""
        self.choose("Run", "runmenu:run-all")
        quiet_since = time.monotonic()

        def finished() -> bool:
            nonlocal quiet_since
            prompts = notebook.prompts()
            if "[*]:" in prompts or set(prompts) == {"[ ]:"}:  # running, or not yet
                quiet_since = time.monotonic()
            return not {"[ ]:", "[*]:"} & set(prompts) or time.monotonic() - quiet_since > QUIET

        wait_for(finished, NOTEBOOK_TIMEOUT, "the last cell")

    @contextmanager
    def width(self, pixels: int) -> Iterator[None]:
        """Another width of the window while the block runs."""
        usual = self.page.viewport_size
        self.page.set_viewport_size({"width": pixels, "height": usual["height"]})
        try:
            yield
        finally:
            self.page.set_viewport_size(usual)

    def take_faults(self) -> list[str]:
        taken, self.faults = self.faults, []
        return taken

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def _note_request(self, url: str) -> None:
        if urlsplit(url).hostname not in LOOPBACK:
            self.faults.append(f"request: {url}")


class Notebook:
    """An open notebook. Its cells have no numbers before they are run (see the fixture `course_copy`)."""

    def __init__(self, panel: Locator, path: Path):
        self.panel = panel
        self.path = path
        self.code_cells = panel.locator(".jp-CodeCell")

    def prompts(self) -> list[str]:
        """What stands beside each cell that has text: [ ]: before it is run, then [*]: and then its number."""
        return self.code_cells.evaluate_all(PROMPTS)

    def read_through(self, pictures: int) -> None:
        """Scrolls to each cell until that many pictures are there: JupyterLab draws what comes into view."""

        def drawn() -> bool:
            for cell in self.code_cells.all():
                cell.scroll_into_view_if_needed()
            return len(self.pictures()) >= pictures

        wait_for(drawn, NOTEBOOK_TIMEOUT, f"{pictures} pictures")

    def saved_outputs(self) -> list[dict]:
        """Saves it, and reads the outputs of its cells from the file."""
        self.panel.page.keyboard.press("Control+s")
        self.panel.page.locator(".lm-DockPanel-tabBar .lm-mod-current.jp-mod-dirty").wait_for(state="detached")
        cells = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        return [output for cell in cells for output in cell.get("outputs", [])]

    def errors(self) -> list[str]:
        """The errors among its outputs. (On the page an error looks like any text on stderr.)"""
        errors = [output for output in self.saved_outputs() if output["output_type"] == "error"]
        return [f"{error['ename']}: {error['evalue']}" for error in errors]

    def pictures(self) -> list[Locator]:
        return self.panel.locator(".jp-OutputArea-output img").all()

    def without_alt_text(self) -> list[str]:
        """The pictures without alt text. (The text of a widget is under its picture.)"""
        pictures = [
            picture for picture in self.pictures() if "widget-image" not in (picture.get_attribute("class") or "")
        ]
        texts = [picture.get_attribute("alt") for picture in pictures]
        return [f"picture {n}" for n, text in enumerate(texts, start=1) if text in (None, "", "Image")]

    def widgets(self) -> list[Widget]:
        """The outputs that have controls."""
        outputs = self.panel.locator(".jp-OutputArea-output").filter(has=self.panel.page.locator(CONTROL))
        return [Widget(output) for output in outputs.all()]

    def folded_sources(self) -> list[Locator]:
        """The pieces of code that are closed until they are clicked."""
        return self.panel.locator(".jp-OutputArea-output details").filter(has=self.panel.page.locator("pre")).all()

    def cell(self, text: str) -> Locator:
        """The code cell whose source has this text."""
        return self.code_cells.filter(has=self.panel.page.locator(".cm-content").filter(has_text=text))

    def write(self, cell: Locator, source: str) -> None:
        """Replaces what a cell says, from the keyboard."""
        cell.locator(".cm-content").click()
        self.panel.page.keyboard.press("Control+a")
        self.panel.page.keyboard.insert_text(source)  # key by key, the editor would indent on its own

    def run(self, cell: Locator) -> None:
        """Runs one cell with Control + Enter."""
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.text_content()
        cell.locator(".cm-content").click()
        self.panel.page.keyboard.press("Control+Enter")
        wait_for(lambda: prompt.text_content() not in (before, "[*]:"), CELL_TIMEOUT, "the cell")

    def shown_by(self, cell: Locator) -> str:
        """The text of a cell's output, which JupyterLab draws when it comes into view."""
        cell.scroll_into_view_if_needed()
        cell.locator(".jp-OutputArea-output").first.wait_for()
        return "\n".join(cell.locator(".jp-OutputArea-output").all_text_contents())

    def cut_off(self) -> list[str]:
        """The pictures that are not there, or reach beyond the page."""
        page = self.panel.locator(".jp-WindowedPanel-outer")
        faults = []
        for number, picture in enumerate(self.pictures(), start=1):
            picture.scroll_into_view_if_needed()
            if not picture.evaluate("img => img.naturalWidth") or _right_edge(picture) > _right_edge(page) + EDGE:
                faults.append(f"picture {number}")
        return faults


# ipywidgets' own classes: texts and progress bars are shown like controls, and are none.
CONTROL = ".widget-inline-hbox:not(.widget-html, .widget-label, .widget-hprogress), .jupyter-button"
# A control may be a button itself.
FOCUSABLE = "xpath=descendant-or-self::*[self::button or self::input or contains(@class, 'noUi-handle')]"


class Widget:
    """A widget's output: controls, and the picture and text that follow them."""

    def __init__(self, output: Locator):
        self.output = output
        self.controls = output.locator(CONTROL).all()

    def look(self) -> str:
        """Its text and the pixels of its pictures, as one string to compare."""
        return self.output.evaluate(LOOK)

    def changes_with(self, act: Callable[[Locator], None], control: Locator) -> None:
        """Acts on a control, and waits for the output to look different."""
        before = self.look()
        act(control)
        wait_for(lambda: self.look() != before, REACTION, "a change of the output")

    def tab_to(self, control: Locator) -> None:
        """Presses Tab until the control has the focus; the number beside a slider has it before the next one."""
        self.output.page.keyboard.press("Tab")
        if not has_focus(control):
            self.output.page.keyboard.press("Tab")
        assert has_focus(control), "the next control is not reached with Tab"

    def press_key(self, control: Locator) -> None:
        """Moves the control that has the keyboard's focus."""
        handle = control.locator(".noUi-handle")
        if not handle.count():
            self.output.page.keyboard.press("Space")
            return
        at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        self.output.page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")

    def use_mouse(self, control: Locator) -> None:
        """Drags a slider's handle to the other half, clicks what is no slider."""
        control.scroll_into_view_if_needed()
        if not control.locator(".noUi-handle").count():
            control.locator(FOCUSABLE).first.click()
            return
        track, handle = control.locator(".noUi-base").bounding_box(), control.locator(".noUi-handle").bounding_box()
        x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
        share = 0.1 if x > track["x"] + track["width"] / 2 else 0.9
        mouse = self.output.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.move(track["x"] + share * track["width"], y, steps=5)
        mouse.up()


def has_focus(element: Locator) -> bool:
    return element.evaluate("element => element.contains(document.activeElement)")


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def _right_edge(element: Locator) -> float:
    box = element.bounding_box()
    return box["x"] + box["width"]
