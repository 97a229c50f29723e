/* SPDX-License-Identifier: MIT
 * The Python module _gpu_poor_C: which kernels run. Its import also runs csrc/ops' static
 * initializers, which register the torch operators. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "gpu_poor.h"

static PyObject *isa(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_FromString(gp.name);
}

static PyObject *set_isa(PyObject *self, PyObject *name)
{
    (void)self;
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return NULL;
    int status = gp_set_isa(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (status < 0) return PyErr_Format(PyExc_ValueError, "no kernels for %R on this CPU", name);
    Py_RETURN_NONE;
}

static PyObject *available(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *names = PyTuple_New(gp_available());
    for (int i = 0; names && i < gp_available(); i++)
        PyTuple_SetItem(names, i, PyUnicode_FromString(gp_available_isa(i)));
    return names;
}

static PyObject *kernels(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *table = PyDict_New();
    const char *kernel, *impl;
    for (int i = 0; table && gp_kernel(i, &kernel, &impl) == 0; i++) {
        PyObject *value = PyUnicode_FromString(impl);
        if (!value || PyDict_SetItemString(table, kernel, value) < 0) Py_CLEAR(table);
        Py_XDECREF(value);
    }
    return table;
}

int gp_alone(void); /* ops/team.cpp */

static PyObject *alone(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyBool_FromLong(gp_alone());
}

/* Places that dicts are prefetched ahead: after a step none of them is in the caches any more. */
enum { kAhead = 16 };

/* Whether mappings[i].get(keys[i]) is values[i] for all i. What fused blocks ask on every call, of some
 * hundred places: ten times as fast as the same in Python. */
static PyObject *unchanged(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *mappings, *keys, *values;
    if (!PyArg_ParseTuple(args, "O!O!O!:unchanged", &PyList_Type, &mappings, &PyList_Type, &keys,
                          &PyList_Type, &values))
        return NULL;
    const Py_ssize_t n = PyList_Size(mappings);
    if (PyList_Size(keys) != n || PyList_Size(values) != n)
        return PyErr_Format(PyExc_ValueError, "unchanged takes three lists of one length");
    for (Py_ssize_t i = 0; i < n; i++) {
        if (i + kAhead < n) __builtin_prefetch((char *)PyList_GetItem(mappings, i + kAhead) + 32);
        PyObject *mapping = PyList_GetItem(mappings, i), *value = PyList_GetItem(values, i);
        if (!PyDict_Check(mapping)) return PyErr_Format(PyExc_TypeError, "mappings must be dicts");
        PyObject *found = PyDict_GetItemWithError(mapping, PyList_GetItem(keys, i));
        if (!found && PyErr_Occurred()) return NULL;
        if ((found ? found : Py_None) != value) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "Name of the fastest implementation in use."},
    {"set_isa", set_isa, METH_O, "Use nothing faster than the named implementation."},
    {"available", available, METH_NOARGS, "Implementations this CPU can run, slowest first."},
    {"kernels", kernels, METH_NOARGS, "For each kernel the implementation that serves it."},
    {"alone", alone, METH_NOARGS, "Whether loops run on the calling thread alone just now."},
    {"unchanged", unchanged, METH_VARARGS, "Whether mappings[i].get(keys[i]) is values[i] for all i."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_gpu_poor_C", "The C kernels of gpu_poor.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__gpu_poor_C(void)
{
    gp_set_isa(NULL);
    return PyModule_Create(&definition);
}
