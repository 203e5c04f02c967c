"""Files of any kind -> documents: which files, which format, which records, and what is wrong with those left out."""
