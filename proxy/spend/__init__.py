"""What was spent: the sums of what requests cost, by budget period, as the journal has them.

windows.py   when a day, a week, a month begins and ends, in a time zone; pure
tally.py     what records cost, added up; pure
file.py      the `spend` file of the state directory: what the collector has stored, and how far it has read
reader.py    the file and what the journal has since: the truth that a worker starts from
"""

from proxy.spend.reader import Spend, SpendReader
from proxy.spend.tally import Amounts, Holder
from proxy.spend.windows import Period, window

__all__ = ["Amounts", "Holder", "Period", "Spend", "SpendReader", "window"]
