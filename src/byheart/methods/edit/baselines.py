"""What baselines of `edit` share: facts in, deltas out, all learnt again whenever some come or go."""

from __future__ import annotations

import datetime as dt
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import Tensor

from byheart.ledger import Ledger
from byheart.methods.contract import LearnReport
from byheart.methods.edit.prompts import Prepared, make_prefixes, prepare
from byheart.methods.edit.weights import ChangedWeights, Deltas
from byheart.methods.facts import choose_facts
from byheart.progress import Progress, untold
from byheart.rows import Fact


class Baseline(ChangedWeights):
    """Facts in, deltas out; a change of the ledger is learnt by starting over, since nothing can be taken out."""

    prefixes: ClassVar[int] = 0
    # Seconds that earlier runs took for what this one goes on with.
    _earlier = 0.0

    layers: Sequence[int]

    def _record(self) -> dict[str, Any]:
        return super()._record() | {"range": list(self.layers)}

    def _load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super()._load(record, tensors)
        self.layers = record.get("range", self.layers)  # whatever a trace has found since

    def learn(self, ledger: Ledger, progress: Progress = untold) -> LearnReport:
        """Write all facts of the ledger that hold."""
        super().learn(ledger)
        return self._learn(list(ledger.facts()), progress)

    def _hold(self, facts: Sequence[Fact], changed: Collection[str]) -> LearnReport:
        return self._learn(facts, untold)

    def _learn(self, facts: Sequence[Fact], progress: Progress) -> LearnReport:
        began = time.perf_counter()
        chosen, skipped = choose_facts(facts, dt.date.today())
        texts = make_prefixes(self.base, self.prefixes, self.settings.seed) if self.prefixes else ()
        prepared, more = prepare(self.base, chosen, texts)
        self.holding, self.skipped = list(facts), skipped | more
        self.facts, self._earlier = [one.fact for one in prepared], 0.0
        self.deltas = self._solve(prepared, progress) if prepared else {}
        return LearnReport(
            seconds=time.perf_counter() - began + self._earlier,
            bytes=self.bytes,
            facts=len(self.facts),
            skipped=dict(Counter(self.skipped.values())),
        )

    @abstractmethod
    def _solve(self, prepared: Sequence[Prepared], progress: Progress) -> Deltas:
        """The change that holds the facts."""
