"""What is on file of a cell that asks for more chunks: its first ones need not be measured again."""

from __future__ import annotations

from turbo_eval.errors import IncompleteError
from turbo_eval.evidence.tokens import Tokens, load
from turbo_eval.records.cell import Cell
from turbo_eval.records.record import Record
from turbo_eval.records.reference import comparison
from turbo_eval.records.store import Store


class Begun:
    """Looks in one store; reads its records once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records = [r for r in store.all() if r.ok and r.tokens is not None]
        self._tokens: dict[str, Tokens] = {}

    def chunks(self, cell: Cell) -> int:
        """How many of the first chunks are on file; always less than are asked for."""
        return max((len(r.running_ppl) for r in self._shorter(cell)), default=0)

    def tokens(self, cell: Cell, chunks: int, *, reference: bool) -> Tokens:
        """The figures of the first chunks; `reference`: those of f16/f16 that lie beside any cache's.

        Raises:
            IncompleteError: there are none.
        """
        found = self._of_comparison(cell) if reference else self._shorter(cell)
        for record in found:
            if len(record.running_ppl) >= chunks and (tokens := self._load(record)) is not None:
                return (tokens.reference() if reference else tokens).first(chunks)
        raise IncompleteError(
            f"the figures of the first {chunks} chunks of {cell.named()} are gone", "run the sweep again"
        )

    def _shorter(self, cell: Cell) -> list[Record]:
        return [
            r
            for r in self._records
            if len(r.running_ppl) < cell.chunks
            and r.cell.model_copy(update={"chunks": cell.chunks}).key() == cell.key()
            and self._load(r) is not None
        ]

    def _of_comparison(self, cell: Cell) -> list[Record]:
        name = comparison(cell)
        return [
            r for r in self._records if comparison(r.cell.model_copy(update={"chunks": cell.chunks})) == name
        ]

    def _load(self, record: Record) -> Tokens | None:
        assert record.tokens is not None
        if record.key not in self._tokens:
            try:
                self._tokens[record.key] = load(self._store.dir / record.tokens.file, record.tokens.sha256)
            except IncompleteError:
                return None
        return self._tokens[record.key]
