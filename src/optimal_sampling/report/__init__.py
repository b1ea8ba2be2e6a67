"""Run folders and evaluations, to look at.

options     of the commands `report` and `show`
folders     run folders with their state, output folders of `evaluate`
selection   which samples of a large run are shown
overview    what is said of a whole run; profiles: diagnostics along the position
samples     records -> entries of the page
page        one HTML file; its markup, style and script are in assets/
show        one sample in a terminal
"""

from optimal_sampling.report.options import ReportOptions, ShowOptions

__all__ = ["ReportOptions", "ShowOptions"]
