// Filled by the library's own files.
