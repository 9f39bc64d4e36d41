"""What coheld top draws, with textual."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import DataTable, Footer, Input, Sparkline, Static

from coheld.backends.survey import Resource
from coheld.history import COLUMNS, History, Row
from coheld.inspecting import resources
from coheld.sight import Sight, see

EVERY = 1.0
"""Seconds from one look to the next."""
_ROWS = 500
"""More are not drawn; sorting and the filter decide which."""


class Looked(Message):
    """A look has ended."""

    def __init__(self, sights: Sequence[Sight]) -> None:
        super().__init__()
        self.sights = sights


class LookFailed(Message):
    """A look has not; the next one may."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Looker(threading.Thread):
    """Looks again and again, and tells the screen: however long a look takes, keys are answered meanwhile.

    A daemon: whoever quits does not wait for a look.
    """

    def __init__(
        self, source: Callable[[], Iterable[Resource]], every: float, tell: Callable[[Message], object]
    ) -> None:
        super().__init__(name="coheld-top", daemon=True)
        self._source, self._every, self._tell = source, every, tell
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                found = [see(one) for one in self._source() if one.name is not None or one.busy]
            except Exception as error:  # whatever it is, the screen says it; a thread that ends would freeze it
                self._tell(LookFailed(error))
            else:
                self._tell(Looked(found))
            self._ended.wait(self._every)

    def end(self) -> None:
        """Look no more; does not wait for a look that has begun."""
        self._ended.set()


class Top(App[int]):
    """source: what there is, called in a thread of its own, every so many seconds."""

    CSS = """
    DataTable { height: 2fr; }
    #detail { height: 1fr; min-height: 6; border-top: solid $primary; }
    #contended { height: 2; margin: 0 1; }
    #who { padding: 0 1; }
    #words { display: none; }
    #words.open { display: block; }
    #status { height: 1; padding: 0 1; color: $text-muted; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "next column"),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "filter", "filter", key_display="/"),
        Binding("escape", "show_all", "show all"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, source: Callable[[], Iterable[Resource]] = resources, every: float = EVERY) -> None:
        super().__init__()
        self.history = History()
        self.place: str | None = None  # of the resource that the detail is of
        self._looker = Looker(source, every, self.post_message)
        self._column, self._reverse, self._words, self._failure = "waiters", False, "", ""
        self._rows: list[Row] = []
        self.table: DataTable[Text] = DataTable(cursor_type="row", zebra_stripes=True)
        self.detail = VerticalScroll(id="detail")
        self.contended, self.who = Sparkline(id="contended"), Static(id="who", markup=False)
        self.words = Input(id="words", placeholder="name, process, method or who waits")
        self.status = Static("a moment …", id="status", markup=False)

    def compose(self) -> ComposeResult:
        yield self.table
        with self.detail:
            yield self.contended
            yield self.who
        yield self.words
        yield self.status
        yield Footer()

    def on_mount(self) -> None:
        self.table.add_columns(*COLUMNS)
        self.table.focus()
        self._looker.start()

    def on_unmount(self) -> None:
        self._looker.end()

    # ---- what happens ------------------------------------------------------------------------------------------------

    def on_looked(self, message: Looked) -> None:
        self.history.add(message.sights)
        self._failure = ""
        self._draw()

    def on_look_failed(self, message: LookFailed) -> None:
        self._failure = f"{type(message.error).__name__}: {message.error}"
        self._draw_status()

    def on_data_table_row_highlighted(self) -> None:
        """That of an old order may come late: so what counts is where the cursor is now."""
        if self._rows and self.table.cursor_row < len(self._rows):
            self.place = self._rows[self.table.cursor_row].sight.resource.place
            self._draw_detail()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self._sort_by(list(COLUMNS)[event.column_index])

    def action_sort(self) -> None:
        names = list(COLUMNS)
        self._sort_by(names[(names.index(self._column) + 1) % len(names)])

    def _sort_by(self, column: str) -> None:
        """By the one that it is sorted by already: the other way round."""
        self._reverse = column == self._column and not self._reverse
        self._column = column
        self._draw()

    def action_reverse(self) -> None:
        self._sort_by(self._column)

    def action_filter(self) -> None:
        self.words.add_class("open")
        self.words.focus()

    def action_show_all(self) -> None:
        self.words.value = ""
        self.words.remove_class("open")
        self.table.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._words = event.value
        self._draw()

    def on_input_submitted(self) -> None:
        self.table.focus()

    # ---- what is drawn -----------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """The cursor stays with its resource, or in its row if that is gone."""
        table = self.table
        if not table.is_attached:  # a look that has ended when the screen is taken down
            return
        row, top = table.cursor_row, table.scroll_y
        self._rows = self.history.rows(self._column, self._reverse, self._words)
        table.clear()
        for one in self._rows[:_ROWS]:
            table.add_row(*_cells(one))
        places = [one.sight.resource.place for one in self._rows[:_ROWS]]
        row = places.index(self.place) if self.place in places else min(row, len(places) - 1)
        self.place = places[row] if places else None
        table.move_cursor(row=max(0, row), scroll=False)
        table.scroll_to(y=top, animate=False)
        self._draw_detail()
        self._draw_status()

    def _draw_detail(self) -> None:
        one = next((row.sight for row in self._rows if row.sight.resource.place == self.place), None)
        self.who.update("\n".join(one.lines()) if one else "")
        rates = self.history.contended(self.place) if self.place else []
        self.contended.data = rates
        self.detail.border_title = f"had to wait, per second of the last minute: {max(rates, default=0):.3g} at most"

    def _draw_status(self) -> None:
        held = sum(bool(row.sight.holder) for row in self._rows)
        waiting = sum(row.sight.resource.waiters for row in self._rows)
        order = f"by {self._column}{', reversed' if self._reverse else ''}"
        words = f"; only with {self._words!r}" if self._words else ""
        told = f"{len(self._rows)} resources, {held} in use, {waiting} wait; {order}{words}"
        self.status.update(f"cannot look: {self._failure}" if self._failure else told)


def _cells(row: Row) -> list[Text]:
    sight, there = row.sight, row.sight.resource
    held = "" if sight.held is None else f"{sight.held:.3g} s"
    waiters = Text(str(there.waiters or ""), style="yellow", justify="right")
    rates = [f"{rate:,.3g}" if rate else "" for rate in (row.taken, row.contended)]
    numbers = [Text(cell, justify="right") for cell in (*rates, str(there.recoveries or ""))]
    return [
        Text(sight.name, style="bold"),
        Text(sight.holder),
        Text(sight.method),
        Text(held, justify="right"),
        waiters,
        *numbers,
    ]
