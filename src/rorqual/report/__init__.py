"""`rorqual report`: a run, or several beside each other, as one HTML file that needs nothing."""

from rorqual.report.page import write_page
from rorqual.report.run import Run, open_run

__all__ = ["Run", "open_run", "write_page"]
