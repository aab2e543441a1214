"""The bundle: one folder with all a deployment needs, described and checked by its `bundle.json`."""

from twotower.bundle.build_record import (
    BUILD_FILE,
    EngineLimits,
    EngineRecord,
    built_targets,
    engine_folder,
    load_engine_record,
    read_engine_record,
    record_problems,
    weight_bytes,
)
from twotower.bundle.derive import derive_bundle, flags_of_bundle, note_measurement
from twotower.bundle.integrity import check_files, remember_files, unverified_files
from twotower.bundle.manifest import (
    DATA_SUFFIX,
    FEATURES,
    GRAPH_FILES,
    MANIFEST_FILE,
    REPORT_FILE,
    SCHEMA,
    TOKENIZER_FILE,
    Bundle,
    is_bundle,
    write_json,
)
from twotower.bundle.steps import EngineFile, ExpertsStep, Profile, Step
from twotower.files import FileRecord, Progress, file_records, hash_file, hash_files, inside, link_file, require_room, unpublished
from twotower.weights.table import TABLE_SUFFIX, read_weight_table, write_weight_table

__all__ = [
    "BUILD_FILE",
    "DATA_SUFFIX",
    "FEATURES",
    "GRAPH_FILES",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "SCHEMA",
    "TABLE_SUFFIX",
    "TOKENIZER_FILE",
    "Bundle",
    "EngineFile",
    "EngineLimits",
    "EngineRecord",
    "ExpertsStep",
    "FileRecord",
    "Profile",
    "Progress",
    "Step",
    "built_targets",
    "check_files",
    "derive_bundle",
    "engine_folder",
    "file_records",
    "flags_of_bundle",
    "hash_file",
    "hash_files",
    "inside",
    "is_bundle",
    "link_file",
    "load_engine_record",
    "note_measurement",
    "read_engine_record",
    "read_weight_table",
    "record_problems",
    "remember_files",
    "require_room",
    "unpublished",
    "unverified_files",
    "weight_bytes",
    "write_json",
    "write_weight_table",
]
