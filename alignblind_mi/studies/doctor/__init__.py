"""The doctor: before an expensive run, is this model one that the instruments can be trusted on, and if not, what is to be done?

Each check measures one number, says what it may be, and what to do. Does NOT change anything, nor judge a model's answers.
"""

from alignblind_mi.studies.doctor.check import Check
from alignblind_mi.studies.doctor.checking import check_up

__all__ = ["Check", "check_up"]
