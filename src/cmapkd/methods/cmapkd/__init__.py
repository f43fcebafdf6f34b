"""CMAPKD: levels of both modalities and a bank of the teacher's embeddings; selection and alignment can be switched on.

Read in this order: `card` (the equations), `config` (what can be set), `levels` and `reading` (what is read of each
level), `method` (the terms), `bank` and `cross_modal` (terms against the bank, and between the modalities). More:
docs/methods/cmapkd.md.
"""

from cmapkd.methods.banked import BankConfig
from cmapkd.methods.cmapkd.config import AblationsConfig, CMAPKDConfig
from cmapkd.methods.cmapkd.method import CMAPKD

__all__ = ["CMAPKD", "AblationsConfig", "BankConfig", "CMAPKDConfig"]
