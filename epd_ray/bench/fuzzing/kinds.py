"""All kinds of documents by name."""

from epd_ray.bench.fuzzing.documents import DOCUMENTS
from epd_ray.bench.fuzzing.files import FILES
from epd_ray.bench.fuzzing.servers import SERVERS

IMPORTERS = {**DOCUMENTS, **FILES, **SERVERS}
