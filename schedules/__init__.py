"""Learning-rate rules: functions of the step, rules that measure, the forecaster of the loss, and averaging."""
