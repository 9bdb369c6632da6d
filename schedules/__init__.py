"""Learning-rate rules: functions of the step, rules that measure, the forecaster of the loss, and averaging."""

from .averaging import averaged, schedule_free_adamw
from .forecast import Forecast, Forecaster, Prior
from .fot import PARTS, FoT, parse_parts, rule_reads
from .rules import ADAPTIVE, RULES, SCHEDULE_FREE, SCHEDULES, lr_factor
from .steering import Planned, make_rule
