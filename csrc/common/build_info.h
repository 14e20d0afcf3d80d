// What setup.py built, and with what: JSON that it writes into a source file of its own.
#pragma once

extern "C" const char* sana_build_info();
