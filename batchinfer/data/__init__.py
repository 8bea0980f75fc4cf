"""Files and rows: the part of a job that reads Parquet, makes requests of rows, and writes Parquet exactly once.

* tables.py: the input's files, rows and schema; columns.py: which columns are used, and do they fit
* reader.py: the rows of a chunk, in bounded memory
* prompts.py: rows -> requests; template.py: Jinja over columns; sampling.py: a row's own sampling parameters
* results.py: completions -> output table
* plan.py: chunks and fingerprint; part.py: one part file, which proves itself; digest.py: digest of a table's values
* commit.py: publication without replacement; ledger.py: the state of a job; audit.py: status and verification
"""
