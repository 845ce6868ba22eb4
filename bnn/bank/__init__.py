"""Weight sample banks: a folder of safetensors shards, written atomically, read without copies."""

from bnn.bank.reader import Bank
from bnn.bank.repair import Repaired, repair
from bnn.bank.shards import verify_files
from bnn.bank.writer import BankWriter

__all__ = ["Bank", "BankWriter", "Repaired", "repair", "verify_files"]
