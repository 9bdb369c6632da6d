"""Learning-rate rules: functions of the step, rules that measure, the forecaster of the loss, and averaging."""

from .averaging import TailAverage, averaged, averages, schedule_free_adamw
from .forecast import Forecast, Forecaster, Prior
from .fot import PARTS, FoT, parse_parts, rule_reads
from .greedy import Greedy
from .rules import ADAPTIVE, GREEDY, RULES, SCHEDULE_FREE, SCHEDULES, SHAPES, lr_factor
from .schedule_free_plus import ScheduleFreePlus
from .steering import Planned, make_rule
