"""Programs around the package: conversion, data, planning, benchmarks, the demo."""
