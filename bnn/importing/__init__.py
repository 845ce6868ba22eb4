"""Posteriors of other tools as banks: checkpoints, draws by chain, laplace-torch, posteriors."""

from bnn.importing.checkpoints import from_checkpoints
from bnn.importing.draws import from_draws, read_draws
from bnn.importing.laplace import from_laplace
from bnn.importing.names import Names
from bnn.importing.states import from_states

__all__ = ["Names", "from_checkpoints", "from_draws", "from_laplace", "from_states", "read_draws"]
