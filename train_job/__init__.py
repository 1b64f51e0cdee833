"""How a model package is made: from text to a registered, promoted version.

`run`, `worker` and `ray_data` know Ray; `tracking`, `spool` and `registry` know MLflow; the loop needs torch alone.
"""

import gptcore  # noqa: F401  # which looks at the Python that runs
