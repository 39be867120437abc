/* Prints the offsets that `agent/src/python/version.rs` has, from the headers of the version that it is
 * compiled against, which must be one that Python's own code is: `-I include/python3.N -I
 * include/python3.N/internal`. */
#define Py_BUILD_CORE 1
#include <Python.h>

#include <stddef.h>
#include <stdio.h>

#include "frameobject.h"
#include "internal/pycore_pystate.h"
#if PY_VERSION_HEX >= 0x03090000
#include "internal/pycore_interp.h"
#include "internal/pycore_runtime.h"
#endif
#if PY_VERSION_HEX >= 0x030b0000
#include "internal/pycore_frame.h"
#endif

#define SHOW(name, type, field) printf(name " %zu\n", offsetof(type, field))

int main(void)
{
    SHOW("thread_next", PyThreadState, next);
    SHOW("thread_id", PyThreadState, thread_id);
#if PY_VERSION_HEX < 0x030b0000
    SHOW("thread_frame", PyThreadState, frame);
    printf("current 65535\n");
    SHOW("frame_previous", PyFrameObject, f_back);
    SHOW("frame_code", PyFrameObject, f_code);
    SHOW("frame_place", PyFrameObject, f_lasti);
    printf("frame_owner 0\n");
    printf("code_start 0\n");
#elif PY_VERSION_HEX < 0x030d0000
    SHOW("thread_frame", PyThreadState, cframe);
    SHOW("current", _PyCFrame, current_frame);
    SHOW("frame_previous", _PyInterpreterFrame, previous);
    SHOW("frame_code", _PyInterpreterFrame, f_code);
    SHOW("frame_place", _PyInterpreterFrame, prev_instr);
#if PY_VERSION_HEX < 0x030c0000
    SHOW("frame_owner", _PyInterpreterFrame, is_entry);
#else
    SHOW("frame_owner", _PyInterpreterFrame, owner);
#endif
    SHOW("code_start", PyCodeObject, co_code_adaptive);
#else
    SHOW("thread_frame", PyThreadState, current_frame);
    printf("current 65535\n");
    SHOW("frame_previous", _PyInterpreterFrame, previous);
    SHOW("frame_code", _PyInterpreterFrame, f_executable);
    SHOW("frame_place", _PyInterpreterFrame, instr_ptr);
    SHOW("frame_owner", _PyInterpreterFrame, owner);
    SHOW("code_start", PyCodeObject, co_code_adaptive);
#endif
    SHOW("first_line", PyCodeObject, co_firstlineno);
    SHOW("filename", PyCodeObject, co_filename);
#if PY_VERSION_HEX < 0x030b0000
    SHOW("name", PyCodeObject, co_name);
#else
    SHOW("name", PyCodeObject, co_qualname);
#endif
#if PY_VERSION_HEX < 0x030a0000
    SHOW("lines", PyCodeObject, co_lnotab);
#else
    SHOW("lines", PyCodeObject, co_linetable);
#endif
#if PY_VERSION_HEX < 0x030b0000
    printf("traceable 0\n");
#else
    SHOW("traceable", PyCodeObject, _co_firsttraceable);
#endif
    printf("ascii %zu\n", sizeof(PyASCIIObject));
    printf("compact %zu\n", sizeof(PyCompactUnicodeObject));
#if PY_VERSION_HEX < 0x030d0000
    SHOW("interpreters", _PyRuntimeState, interpreters.head);
    SHOW("interpreter_next", PyInterpreterState, next);
#if PY_VERSION_HEX < 0x030b0000
    SHOW("interpreter_threads", PyInterpreterState, tstate_head);
#else
    SHOW("interpreter_threads", PyInterpreterState, threads.head);
#endif
#endif
    return 0;
}
