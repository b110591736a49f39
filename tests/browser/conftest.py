"""One JupyterLab and one browser for all tests of this folder (for each process of pytest-xdist, if there are several).

They run on loopback, in a temporary copy of the course: JupyterLab saves what is open, and the repository's
notebooks must stay as they are.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.browser.lab import Lab, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT = 60  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # so that nothing can reach another machine


@pytest.fixture(scope="session")
def chromium():
    """The browser's program: what CHROMIUM names, else the first that is installed."""
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip("browser tests not run: no Chromium (on Debian: apt-get install chromium), nor named in CHROMIUM")
    return found


@pytest.fixture(scope="session")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def course_copy(chromium, tmp_path_factory):
    """The course in a folder that goes away. Its notebooks' cells lose their numbers, to tell those that were run."""
    copy = tmp_path_factory.mktemp("browser") / "course"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist"))
    for path in copy.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["execution_count"] = None
        path.write_text(json.dumps(notebook), encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def address(course_copy):
    """JupyterLab's address, with a token, while it runs on a free port of loopback."""
    home, token = course_copy.parent, secrets.token_urlsafe()
    runtime = home / "runtime"
    folders = {"RUNTIME": runtime, "CONFIG": home / "config", "DATA": home / "data"}
    environment = os.environ | {f"JUPYTER_{name}_DIR": str(folder) for name, folder in folders.items()}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "desk")}
    environment |= {"PYTHONPATH": str(course_copy), "HF_HUB_OFFLINE": "1"}
    # Like tests/conftest.py: threads that wait for each other cost more than they bring.
    environment |= {"MINILLM_PROGRESS": str(home / "progress.json"), "OMP_NUM_THREADS": "1"}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={course_copy}", "--allow-root"]
    # No question about news before the first lesson: `make setup` has seen to it, another installation may not.
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "page_config.json").write_text(json.dumps(disabled))
    with open(home / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={token}"]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: any(runtime.glob("jpserver-*.json")), START_TIMEOUT, f"JupyterLab, see {log.name}")
        (info,) = runtime.glob("jpserver-*.json")
        yield f"{json.loads(info.read_text())['url']}lab?token={token}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def lab(browser, address, course_copy):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1000 * START_TIMEOUT)
    return Lab(context, address, course_copy)
