"""Weight sample banks: a folder of safetensors shards, written atomically, read without copies."""

from bnn.bank.compacting import compact
from bnn.bank.exporting import mean, write_chains, write_state_dict
from bnn.bank.merging import merge
from bnn.bank.moving import materialise, thin
from bnn.bank.planning import BankSize, size_of
from bnn.bank.reader import Bank
from bnn.bank.repair import Repaired, repair
from bnn.bank.verifying import lost_shards, unnamed_shards, verify_files, wrong_sizes
from bnn.bank.virtual import VirtualBank
from bnn.bank.writer import BankWriter

__all__ = [
    "Bank",
    "BankSize",
    "BankWriter",
    "Repaired",
    "VirtualBank",
    "compact",
    "lost_shards",
    "materialise",
    "mean",
    "merge",
    "repair",
    "size_of",
    "thin",
    "unnamed_shards",
    "verify_files",
    "write_chains",
    "write_state_dict",
    "wrong_sizes",
]
