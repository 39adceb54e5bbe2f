"""Every message a user can see, in one place.

Each function builds one exception whose text is a single sentence: what is wrong, where, and what
to do about it. Raise it at the place that noticed: ``raise errors.unknown_option(name, known)``.
`kinds` holds the exceptions, every other file the messages of one part of the house.
"""

from fxquant.errors.calibration import *
from fxquant.errors.files import *
from fxquant.errors.graphs import *
from fxquant.errors.kernels import *
from fxquant.errors.kinds import *
from fxquant.errors.options import *
from fxquant.errors.weights import *
