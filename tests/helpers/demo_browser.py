"""A headless Chromium on the demo's page: what the browser test drives, and how the docs' screenshot is taken.

The screenshot is of a demo that runs (`agevlm demo MODEL SECOND`):

    python tests/helpers/demo_browser.py http://127.0.0.1:7860 PICTURE QUESTION docs/images/demo.webp
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageChops


WAIT = 60  # seconds; answers take one


def missing() -> str | None:
    """Why there is no browser here, None if there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not found (Debian: chromium, chromium-driver)" if absent else None


class Page:
    """The demo in a browser."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.all("#question textarea"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        found = self.all(selector)
        assert len(found) == 1, f"{len(found)} elements are {selector}"
        return found[0]

    def wait(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT, 0.2, [StaleElementReferenceException]).until(lambda _: condition())

    def upload(self, path: Path) -> None:
        """Gives the page a file for its picture, in place of any that is there."""
        for button in self.all("#pictures button[aria-label='Clear'], #pictures button[title='Clear']"):
            button.click()
        self.wait(lambda: self.all("#pictures input[type=file]"))
        self.one("#pictures input[type=file]").send_keys(str(path.resolve()))

    def ask(self, question: str) -> None:
        """Types the question and sends it, without waiting for the answers."""
        self.driver.execute_script("for (const f of document.querySelectorAll('figure')) f.classList.add('old')")
        box = self.one("#question textarea")
        box.clear()
        box.send_keys(question + "\n")

    def answers(self) -> list:
        """The complete answers to the last question."""
        places = len(self.all(".block.place"))
        self.wait(lambda: len(self.all("figure[data-token]:not(.old)")) == places)
        return self.all("figure[data-token]")

    def point(self, element) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).scroll_to_element(element).move_to_element(element).perform()

    def message(self) -> str:
        """What the page's error message says; closes it."""
        self.wait(lambda: any(toast.text.strip() for toast in self.all(".toast-body")))
        text = " ".join(toast.text for toast in self.all(".toast-body"))
        for button in self.all(".toast-close"):
            self.driver.execute_script("arguments[0].click()", button)
        self.wait(lambda: not self.all(".toast-body"))
        return text


@contextmanager
def opened(address: str, width: int = 1280, height: int = 900) -> Iterator[Page]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    # With the driver's path, selenium looks for none on the network.
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Page(driver, address)
    finally:
        driver.quit()


def main(address: str, picture: str, question: str, output: str) -> None:
    with opened(address) as page:
        page.upload(Path(picture))
        page.wait(lambda: page.all("#pictures img"))
        page.ask(question)
        page.answers()  # with the look of the question
        page.driver.execute_script("window.scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
        used = ImageChops.invert(shot).getbbox() or (0, 0, *shot.size)
        shot.crop((0, 0, shot.width, min(shot.height, used[3] + 24))).save(output, quality=88, method=6)
        print(f"{output}: {Path(output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    main(*sys.argv[1:])
