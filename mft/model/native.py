"""The name under which the READMEs of saved ALiBi models import the native classes; they live in
`mft.model.legacy`."""

from mft.model.legacy import native

__doc__ = native.__doc__ or __doc__
