"""What came of simulations, as one HTML page: tables and plots that compare policies. Needs `preble[report]`."""

from preble.sim.report.report import report_page, write_report

__all__ = ["report_page", "write_report"]
